"""An Orbax folder whose arrays exist but hold nothing yet: metadata and commit marks by Orbax.

Its files depend on the arrays alone, not on the time or the place, so equal weights give equal
bytes. Who fills the arrays is not known here.
"""

import json
import pathlib
from collections.abc import Mapping

import orbax.checkpoint as ocp
import tensorstore as ts

from qwen_jax.files import write_json
from qwen_jax.layout import StoredLeaf
from qwen_jax.params import nest


def make_empty_arrays(folder: pathlib.Path, leaves: Mapping[str, StoredLeaf]) -> None:
    """Makes `folder` with an empty array for each dotted name."""
    registry = ocp.type_handlers.create_type_handler_registry((StoredLeaf, _EmptyArrays()))
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_ocdbt=False, use_zarr3=True
    )
    tree = nest({tuple(name.split(".")): leaf for name, leaf in leaves.items()})
    with ocp.Checkpointer(handler) as saver:
        saver.save(folder, args=ocp.args.PyTreeSave(tree))
    path = folder / "_CHECKPOINT_METADATA"
    times = {"init_timestamp_nsecs": 0, "commit_timestamp_nsecs": 0}
    write_json(path, json.loads(path.read_text()) | times)
    (folder / "commit_success.txt").write_text("committed\n")  # Orbax writes the full path


class _EmptyArrays(ocp.type_handlers.TypeHandler):
    """What Orbax calls to save a StoredLeaf."""

    def typestr(self) -> str:
        return "np.ndarray"  # read back by the stock handlers, without a sharding on record

    async def metadata(self, infos):
        raise NotImplementedError("only writes; checkpoints are read by the stock handlers")

    async def deserialize(self, infos, args=None):
        raise NotImplementedError("only writes; checkpoints are read by the stock handlers")

    async def serialize(self, values, infos, args=None):
        async def create() -> None:
            for leaf, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                await ts.open(leaf.spec(info.parent_dir / info.name), create=True, open=True)

        return [ocp.future.CommitFutureAwaitingContractedSignals(create(), name="empty arrays")]
