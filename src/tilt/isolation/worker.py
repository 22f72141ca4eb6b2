"""The program of a worker process: it loads one file and answers one request after the other, below a keeper.

Started by path. Requests are pickles from the run; answers are JSON, because the run trusts nothing it reads. Both are numbered, so that what somebody else
wrote into the pipe is not taken for an answer.
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
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # this very tilt, whichever is installed

from tilt.isolation import kernel
from tilt.isolation.keeper import keep

if __name__ == "__main__":
    del sys.path[0]

HEAD = struct.Struct("!QQ")  # length and number of a request or an answer
LONGEST = 200  # characters of a text where a number should be


def plain(value: object) -> object:
    """A score as JSON can say it: numpy scalars become numbers, a text is cut, whatever is unknown its type's name."""
    item = getattr(value, "item", None)
    if callable(item):
        value = item()
    if isinstance(value, str):
        return value[:LONGEST]
    if isinstance(value, int) and value.bit_length() > 1100:
        return float("inf") if value > 0 else -float("inf")
    return value if value is None or isinstance(value, bool | int | float) else {"type": type(value).__name__}


def answer(function: object, asked: dict[str, object]) -> object:
    """What the function gives for the arguments that it takes: a list of scores, or the type, or the number, of what is none."""
    arguments = asked
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
    if not isinstance(found, list | tuple):
        return {"type": type(found).__name__}
    most = max((len(v) for v in asked.values() if isinstance(v, list)), default=0)
    return [plain(v) for v in found] if len(found) <= most + 100 else {"many": len(found)}


def load(path: str, name: str) -> object:
    spec = importlib.util.spec_from_file_location("tilt_reward_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, os.path.dirname(path))
    spec.loader.exec_module(module)
    return getattr(module, name)


def serve(given: dict[str, object], entered: int) -> None:
    """Load the function and answer until the run closes its end; what the function prints goes to the log, not into the answers."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    mine, number = os.getpid(), 0
    kernel.limit(resource.RLIMIT_CORE, 0)
    for kind, name in ((resource.RLIMIT_AS, "memory"), (resource.RLIMIT_FSIZE, "file_size"), (resource.RLIMIT_NPROC, "users_processes")):
        kernel.limit(kind, int(given[name]))  # type: ignore[call-overload]
    if given["cpu"]:
        kernel.limit(resource.RLIMIT_CPU, int(given["cpu"]), spare=2)  # type: ignore[call-overload]

    def reply(message: dict[str, object]) -> None:
        if os.getpid() != mine:
            os._exit(0)  # a copy that the function forked must not answer
        text = json.dumps(message).encode()
        replies.write(HEAD.pack(len(text), number) + text)
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

    function: object = None

    def start() -> dict[str, object]:
        nonlocal function
        function = load(str(given["path"]), str(given["name"]))
        report = getattr(sys.modules["tilt_reward_file"], "report", None) if given["trusted"] else None
        return {"apart": bool(entered & kernel.NEWPID), **(report() if report else {})}

    attempt(start)
    while len(head := requests.read(HEAD.size)) == HEAD.size:
        length, number = HEAD.unpack(head)
        body = requests.read(length)
        attempt(lambda body=body: answer(function, pickle.loads(body)))


def main() -> None:
    given = json.loads(sys.argv[1])
    limits = {name: int(given[name]) for name in ("processes", "memory")}
    wished = (kernel.NEWPID | kernel.NEWNS, kernel.NEWPID) if given["namespaces"] else ()
    keep(int(given["run"]), lambda entered: serve(given, entered), **limits, namespaces=kernel.first_able(*wished))


if __name__ == "__main__":
    main()
