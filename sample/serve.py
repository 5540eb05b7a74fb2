"""An OpenAI-compatible server: `python -m sample.serve --checkpoint CKPT`.

Requests that arrive together, or while others run, share one batch. Loads the model, listens,
and ends cleanly: on Ctrl-C or SIGTERM no new request is taken, those that run have --grace seconds
to finish, and the rest are told. Needs the extra `serve`.
"""

import asyncio
import contextlib
import importlib.util
import ipaddress
import pathlib
import signal
import socket
import sys
from dataclasses import dataclass

from qwen_jax import api, runtime
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError, UsageError
from qwen_jax.manifest import load_manifest, planned_manifest
from qwen_jax.slots import Slots
from sample.generate import LoadFlags, check_load_flags, open_model
from sample.plan import MOST, print_plan
from sample.scheduler import Scheduler

# What the extra `serve` brings.
NEEDED = ("pydantic", "starlette", "uvicorn")


@dataclass(kw_only=True)
class Args(LoadFlags):
    """Serve a model as OpenAI's API does."""

    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0: every network of this machine"""
    port: int = 8000
    """0: any free one"""
    api_key: str | None = None
    """what clients must send as their key; unset: nothing"""
    model_name: str | None = None
    """name of the model in requests; unset: the checkpoint's folder name"""
    max_context: int | None = None
    """tokens of prompt and answer together; unset: the model's seq_length"""
    max_batch: int = 8
    """requests that generate at the same time; each keeps a cache row of up to max_context"""
    max_waiting: int = 256
    """requests that may wait for a row; further ones get status 429"""
    grace: float = 30.0
    """seconds that running requests have to finish after Ctrl-C or SIGTERM"""


def _check(args: Args) -> None:
    """All that can be refused before minutes of loading."""
    check_load_flags(args)
    for name, least in (("port", 0), ("max_batch", 1), ("max_waiting", 1), ("grace", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} is {getattr(args, name)}; expected at least {least}")
    if args.max_batch > MOST:
        raise UsageError(f"--max_batch is {args.max_batch}; expected at most {MOST}")
    if args.port > 65535:
        raise UsageError(f"--port is {args.port}; expected at most 65535")
    if args.api_key is not None and not (args.api_key.isascii() and args.api_key.strip()):
        raise UsageError("--api_key is empty or not ASCII; expected a secret word")


def _context(args: Args, cfg: ModelConfig) -> int:
    context = cfg.seq_length if args.max_context is None else args.max_context
    if context < 2:
        raise InputError(f"--max_context is {context}; expected at least 2 tokens")
    if context > cfg.seq_length and not cfg.use_dynamic_ntk:
        raise InputError(
            f"--max_context is {context}, but this model was trained for {cfg.seq_length} tokens "
            "and has no dynamic NTK to go beyond"
        )
    return context


def _bind(host: str, port: int) -> socket.socket:
    """Takes the port, without listening yet: a client is refused until the model is there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        with contextlib.suppress(OSError):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"cannot listen at {host} port {port}: {error}; choose another --host or --port"
        ) from None
    return bound


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _serve(args: Args, bound: socket.socket, model: api.Model, context: int) -> None:
    """Runs until a signal comes."""
    import uvicorn  # lent by the extra, and slow to import

    from sample.http_app import Served, create_app

    scheduler = Scheduler(Slots(model.engine, args.max_batch), args.max_waiting)
    served = Served(
        name=args.model_name or pathlib.Path(args.checkpoint).resolve().name,
        tokenizer=model.tokenizer,
        defaults=model.defaults,
        context=context,
        system=args.system,
        api_key=args.api_key,
    )
    host, port = bound.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f"serving {served.name} at http://{host}:{port}/v1", flush=True)

        async def shutdown(self, sockets=None) -> None:
            """What still runs after the grace is told so and ends; without this it is cut."""
            loop = asyncio.get_running_loop()
            loop.call_later(args.grace, loop.run_in_executor, None, scheduler.close)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        create_app(served, scheduler),
        log_level="warning",
        timeout_graceful_shutdown=int(args.grace) + 10,  # if a client does not read its answer
    )
    server = Server(config)

    def leave(*_) -> None:
        server.should_exit = True

    # uvicorn shuts down and then raises the signal again, for the handler that stood before: with
    # this one a clean end is exit 0.
    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[bound])
    finally:
        scheduler.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> None:
    runtime.configure()
    args = parse(Args, argv)
    _check(args)
    if args.plan:
        manifest = planned_manifest(args.checkpoint)
        print_plan(args, manifest, rows=args.max_batch, adapter=args.adapter is not None)
        return
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"the server needs {', '.join(missing)}, not installed here: pip install -e '.[serve]'"
        )
    context = _context(args, load_manifest(pathlib.Path(args.checkpoint)).config)
    with _bind(args.host, args.port) as bound:
        model = open_model(args)
        if model.defaults.chat_format == "raw":
            print("warning: a base model, not trained to chat", file=sys.stderr)
        if args.api_key is None and not _is_loopback(args.host):
            print(
                f"warning: anyone who reaches {args.host} may use it: no --api_key", file=sys.stderr
            )
        _serve(args, bound, model, context)
        print("stopped", flush=True)


if __name__ == "__main__":
    run(main)
