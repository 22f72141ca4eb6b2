"""The program of an isolated reward's worker process: it loads one user file and answers one batch after the other.

Started by path, so it imports the standard library only. Requests are pickles from the parent; answers are JSON, because the parent trusts nothing it reads.
"""

import asyncio
import contextlib
import importlib.util
import inspect
import json
import os
import pickle
import resource
import struct
import sys
import traceback


def limit(kind: int, amount: int) -> None:
    """Lower a limit of this process for good; a limit that the system refuses to set is left to the parent's clock."""
    if amount > 0:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (amount, amount))


def plain(value: object) -> object:
    """A score as JSON can say it: numpy scalars become numbers, whatever is unknown its type's name."""
    item = getattr(value, "item", None)
    if callable(item):
        value = item()
    return value if value is None or isinstance(value, bool | int | float | str) else {"type": type(value).__name__}


def answer(function: object, arguments: dict[str, object]) -> object:
    parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {k: v for k, v in arguments.items() if k in parameters}
    found = function(**arguments)  # type: ignore[operator]
    if inspect.isawaitable(found):

        async def finish() -> object:
            return await found

        found = asyncio.run(finish())
    tolist = getattr(found, "tolist", None)
    found = tolist() if callable(tolist) else found
    return [plain(v) for v in found] if isinstance(found, list | tuple) else {"type": type(found).__name__}


def load(path: str, name: str) -> object:
    spec = importlib.util.spec_from_file_location("tilt_reward_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, os.path.dirname(path))
    spec.loader.exec_module(module)
    return getattr(module, name)


def main() -> None:
    path, name, memory, cpu = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints goes to the log, not into the answers
    mine = os.getpid()
    limit(resource.RLIMIT_CORE, 1)
    limit(resource.RLIMIT_AS, memory)
    limit(resource.RLIMIT_CPU, cpu)
    function: object = None

    def reply(message: dict[str, object]) -> None:
        if os.getpid() != mine:
            os._exit(0)  # a copy that the function forked must not answer
        text = json.dumps(message).encode()
        replies.write(struct.pack("!Q", len(text)) + text)
        replies.flush()

    def attempt(work) -> None:  # type: ignore[no-untyped-def]
        try:
            reply({"value": work()})
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            with contextlib.suppress(BaseException):
                reply(
                    {"error": f"{type(error).__name__}: {error}"[:2000], "where": f"{os.path.basename(last.filename)}, line {last.lineno}"}
                )

    def start() -> None:
        nonlocal function
        function = load(path, name)

    attempt(start)
    while len(head := requests.read(8)) == 8:
        body = requests.read(struct.unpack("!Q", head)[0])
        attempt(lambda body=body: answer(function, pickle.loads(body)))


if __name__ == "__main__":
    main()
