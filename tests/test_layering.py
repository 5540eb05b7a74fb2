"""Dependencies go one way: each file imports only what stands above it."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
ORDER = [
    "errors",
    "files",
    "staging",
    "journal",
    "config",
    "runtime",
    "processes",
    "sharding",
    "quant",
    "remat",
    "kernels",
    "params",
    "peft_files",
    "adapters",
    "memory",
    "cache",
    "positions",
    "packed_params",
    "layer_modes",
    "layer_loop",
    "layer_weights",
    "model",
    "packed",
    "prefill",
    "manifest",
    "layout",
    "checkpoint",
    "orbax_folder",
    "checkpoint_writer",
    "tokenizer",
    "chatml",
    "sampling",
    "generation_config",
    "drafts",
    "steps",
    "engine",
    "slots",
    "api",
    "cli",
    "nnx",
]
PROGRAMS = ("convert", "train", "sample")


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_each_core_file_imports_only_what_stands_above_it():
    files = [path for path in (ROOT / "qwen_jax").glob("*.py") if path.stem != "__init__"]
    assert {path.stem for path in files} | {"kernels"} == set(ORDER)
    for path in files:
        for name in imported(path):
            top, _, rest = name.partition(".")
            assert top not in (*PROGRAMS, "demo", "benchmarks"), f"{path.name} imports {name}"
            if top == "qwen_jax":
                above = ORDER.index(rest.split(".")[0]) < ORDER.index(path.stem)
                assert above, f"{path.name} imports {name}, which stands below it"


def test_programs_do_not_import_each_other_or_torch():
    for package in PROGRAMS:
        for path in (ROOT / package).glob("*.py"):
            tops = {name.partition(".")[0] for name in imported(path)}
            others = set(PROGRAMS) - {package} | {"demo", "benchmarks"}
            banned = tops & (others | {"torch", "transformers", "peft", "bitsandbytes"})
            assert not banned, f"{package}/{path.name} imports {banned}"
