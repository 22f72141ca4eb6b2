"""Named public data sets: where each comes from, its checksums and licence, and how it is fetched."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tilt.errors import DataError, UsageError

RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class File:
    """One file of a set: its local name, its path in the upstream repository, its size in bytes and its SHA-256."""

    name: str
    upstream: str
    bytes: int
    sha256: str

    @property
    def stem(self) -> str:
        """The name without its endings: `test.jsonl.gz` → `test`."""
        return self.name.split(".")[0]


@dataclass(frozen=True)
class PublicSet:
    """A set of files at one commit of an upstream repository. The first file is read when only the set is named.

    `lines` says that each line of a text file is a row of its own.
    """

    name: str
    repository: str
    commit: str
    licence: str
    purpose: str
    files: tuple[File, ...]
    papers: tuple[File, ...] = ()
    lines: bool = False

    @property
    def everything(self) -> tuple[File, ...]:
        """Data files, then the licence or the readme that states it."""
        return self.files + self.papers

    def file(self, name: str) -> File:
        """The file of this name, with or without its endings."""
        for file in self.files:
            if name in (file.name, file.stem):
                return file
        names = [file.name for file in self.files]
        raise DataError(f"{self.name} has no file {name!r}{nearest(name, names)}\n  it has: {', '.join(names)}")


def nearest(name: str, known: list[str]) -> str:
    """`: did you mean 'gsm8k'?`, or nothing where no known name is near."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else ""


def cache_directory() -> Path:
    """Where fetched sets lie: `$TILT_CACHE`, else `~/.cache/tilt/data`."""
    return Path(os.environ.get("TILT_CACHE") or Path.home() / ".cache" / "tilt" / "data")


def lookup(name: str) -> PublicSet:
    """The set of this name; an unknown name is an error that lists the known ones."""
    if name not in SETS:
        raise DataError(f"no data set is called {name!r}{nearest(name, list(SETS))}\n  known sets: {', '.join(SETS)}")
    return SETS[name]


def find(name: str, file: str = "") -> Path:
    """The path of a set's file (its first by default) under `$TILT_DATA/NAME` or in the cache."""
    public = lookup(name)
    wanted = public.file(file) if file else public.files[0]
    roots = [Path(os.environ["TILT_DATA"])] if os.environ.get("TILT_DATA") else []
    for root in [*roots, cache_directory()]:
        if (root / name / wanted.name).is_file():
            return root / name / wanted.name
    looked = ", ".join(str(root / name) for root in [*roots, cache_directory()])
    raise DataError(
        f"{name}/{wanted.name} is not on this machine (looked in {looked})\n"
        f"  fetch it:  tilt data get {name}\n  or set TILT_DATA to a folder that holds {name}/{wanted.name}"
    )


def get(
    name: str,
    *,
    base_url: str = RAW,
    cache: Path | None = None,
    registry: Mapping[str, PublicSet] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Fetch a set into the cache and return its folder. Every file is checked before it takes its name; a good file is kept."""
    public = (registry or {}).get(name) or lookup(name)
    folder = (cache or cache_directory()) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}\n  set TILT_CACHE to a folder that can be written") from None
    say(f"{name}: {public.purpose}\n  from github.com/{public.repository} at {public.commit[:12]}\n  licence: {public.licence}")
    for file in public.everything:
        target = folder / file.name
        if target.is_file() and _digest(target) == file.sha256:
            say(f"  {file.name}: already here, checksum right")
            continue
        _fetch(f"{base_url.rstrip('/')}/{public.repository}/{public.commit}/{file.upstream}", target, file)
        say(f"  {file.name}: {file.bytes:,} bytes, checksum right")
    return folder


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch(url: str, target: Path, file: File) -> None:
    """Download to a temporary name beside the target, verify size and checksum, then rename."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{file.name}.")
    part = Path(temporary)
    try:
        with os.fdopen(handle, "wb") as out, urllib.request.urlopen(url, timeout=60) as answer:
            left = file.bytes + 1  # one byte more than promised is enough to know that it is another file
            while left > 0 and (chunk := answer.read(min(left, 1 << 16))):
                out.write(chunk)
                left -= len(chunk)
        found = _digest(part)
        if found != file.sha256:
            size = part.stat().st_size
            raise DataError(
                f"{file.name} from {url} is not the expected file; nothing was kept\n"
                f"  expected {file.bytes:,} bytes, sha256 {file.sha256[:16]}…\n"
                f"  received {'more' if size > file.bytes else f'{size:,}'} bytes, sha256 {found[:16]}…"
            )
        os.chmod(part, 0o644)
        os.replace(part, target)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"cannot fetch {url}: {reason}\n  without a network, copy the file to {target}, or set TILT_DATA to a folder that has it"
        ) from None
    finally:
        part.unlink(missing_ok=True)


_SETS = (
    PublicSet(
        "rasbt-instruct",
        "rasbt/LLMs-from-scratch",
        "28c65cdfbc3338e2e040016eea4b7fdf556e4d57",
        "Apache-2.0",
        "1,100 instructions, with 1,100 polite and impolite answers: SFT, reward model, DPO",
        (
            File(
                "instruction-data-with-preference.json",
                "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
                386968,
                "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
            ),
            File(
                "instruction-data.json",
                "ch07/01_main-chapter-code/instruction-data.json",
                203524,
                "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
            ),
        ),
        papers=(File("LICENSE.txt", "LICENSE.txt", 11505, "4b6615cdb446946fa1907e1d195e02130d6833fbd162e018b60dd39893fb231f"),),
    ),
    PublicSet(
        "gsm8k",
        "openai/grade-school-math",
        "3101c7d5072418e28b9008a6636bde82a006892c",
        "MIT",
        "grade-school mathematics with worked answers: SFT, RL with a numeric reward",
        (
            File(
                "train.jsonl",
                "grade_school_math/data/train.jsonl",
                4166206,
                "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
            ),
            File(
                "test.jsonl",
                "grade_school_math/data/test.jsonl",
                749738,
                "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
            ),
            File(
                "test_socratic.jsonl",
                "grade_school_math/data/test_socratic.jsonl",
                972978,
                "c96673362fa7a699f4836a9b6474a067448f95fe58064727501ee63ba4c3fdb6",
            ),
            File(
                "example_model_solutions.jsonl",
                "grade_school_math/data/example_model_solutions.jsonl",
                2563513,
                "4bc62db838f8418365d51c627bd66294cbdca9fb7f01519cb13f0dce8c51580b",
            ),
        ),
        papers=(File("LICENSE", "LICENSE", 1062, "86bbb73e855821d7c401912fd4bf82e34313e6e3b6fd6f909f2b6cc9e209a53b"),),
    ),
    PublicSet(
        "hh-rlhf",
        "anthropics/hh-rlhf",
        "354e5c3cb8960630860dd5774a6ac2a58313bf4d",
        "MIT",
        "pairs of dialogues, one of them less harmful (offensive text): reward model, DPO",
        (File("test.jsonl.gz", "harmless-base/test.jsonl.gz", 742801, "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03"),),
        papers=(File("LICENSE", "LICENSE", 1066, "d4fb18db48757e273261a5597b8a09381de8073da060474ce33d0643e06c875e"),),
    ),
    PublicSet(
        "svamp",
        "arkilpatel/SVAMP",
        "689d7ccac74b9983a2ac7cc3b264f441b99e7c53",
        "MIT",
        "short arithmetic word problems: RL with a numeric reward",
        (File("SVAMP.json", "SVAMP.json", 339970, "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e"),),
        papers=(File("LICENSE", "LICENSE", 1068, "07ce3a34de7a865345634f9278bc26ddcacc2d0defd348c28e3f4603448b9ba4"),),
    ),
    PublicSet(
        "names",
        "karpathy/makemore",
        "988aa59e4d8fefa526d06f3b453ad116258398d4",
        "MIT",
        "first names, one a line: tiny models from scratch",
        (File("names.txt", "names.txt", 228145, "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"),),
        papers=(File("LICENSE", "LICENSE", 1072, "a59ec5cdb1c1e447e5266a014b3e7ded511f8d6e5a08931e931c87490ff821fe"),),
        lines=True,
    ),
    PublicSet(
        "tinyshakespeare",
        "karpathy/char-rnn",
        "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e",
        "MIT (stated in the upstream readme; the text is in the public domain)",
        "plays by Shakespeare: tiny language models from scratch",
        (File("input.txt", "data/tinyshakespeare/input.txt", 1115394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),),
        papers=(File("UPSTREAM_Readme.md", "Readme.md", 12795, "6540438971f884ae42315e517df7c9d0e1ca520daa120f0d0845b50944485ec4"),),
    ),
    PublicSet(
        "anthropic-evals",
        "anthropics/evals",
        "84fcc677e52e1902d696c32cd1a6b663e70d3993",
        "CC-BY-4.0 (attribution: Anthropic, model-written evaluations)",
        "yes-or-no questions with a known right answer: reward model, DPO",
        (
            File(
                "agreeableness.jsonl",
                "persona/agreeableness.jsonl",
                307954,
                "8caa0fa07946370fb4ec38dd82eda7d3a86591c1dc701d2e645ae33c3239f5ce",
            ),
            File(
                "conscientiousness.jsonl",
                "persona/conscientiousness.jsonl",
                318633,
                "fd05517c0a453a7b47d19964ac6528db394c8cd00a5f74cc11d91479a20b90a6",
            ),
            File(
                "interest-in-math.jsonl",
                "persona/interest-in-math.jsonl",
                315853,
                "f835b449fb0cb1ba7642778899273be1f634ad93f661af5dbde5629432e1f254",
            ),
        ),
        papers=(File("LICENSE", "LICENSE", 18650, "7e7170e3cebf88a9f60c7b8421418323c09304da1af4d5e90f4da1dc1c8a2661"),),
    ),
    PublicSet(
        "llamafactory-demo",
        "hiyouga/LLaMA-Factory",
        "ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30",
        "Apache-2.0 (demonstration cuts of upstream sets, see UPSTREAM_README.md)",
        "small samples of every common format: Alpaca, ShareGPT, pairs, labels, tool calls",
        (
            File(
                "alpaca_en_demo.json",
                "data/alpaca_en_demo.json",
                859893,
                "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
            ),
            File(
                "alpaca_zh_demo.json",
                "data/alpaca_zh_demo.json",
                636036,
                "d5a4be46ae70d23a461ffc16048069324c0865ee9aa0c8730e21ac4b65ea0f08",
            ),
            File("dpo_en_demo.json", "data/dpo_en_demo.json", 1575286, "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3"),
            File("dpo_zh_demo.json", "data/dpo_zh_demo.json", 853311, "9ea7206bc1a45df8b7811d1fc02d5555c65379d05905f343da88f221ff145376"),
            File("kto_en_demo.json", "data/kto_en_demo.json", 913519, "9891687dea7c00e54af2e39534085c151ce3462d073574eeff2af927cc56fb74"),
            File(
                "glaive_toolcall_en_demo.json",
                "data/glaive_toolcall_en_demo.json",
                738925,
                "8b84773e44e71881f32490080350734cad3069dc227eafd771ccfb80732f6437",
            ),
            File("identity.json", "data/identity.json", 20306, "fd029da7dd3df283ed034c82375d16d125a7b07cf1cb0316d03fb8743057d5f2"),
        ),
        papers=(
            File("LICENSE", "LICENSE", 11324, "50e6751797c50dedd75ef1b8a0d9e42f5f8472e9fbce91f34718e9f97b0c780a"),
            File("UPSTREAM_README.md", "data/README.md", 13741, "ab8669383cc3c6a1b64ed9a48ba5819c74c5d38bac6b7a41615337da543de508"),
        ),
    ),
)
SETS: dict[str, PublicSet] = {public.name: public for public in _SETS}
