"""Rollouts on disk: what is written comes back, text offsets are exact bytes, a torn write leaves nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tilt.data.rollouts import Prompt, Rollout, Sampling
from tilt.errors import DataError
from tilt.objectives.experience import Rewards
from tilt.runs import rollout_store
from tilt.runs.offsets import Spelling, text_offsets
from tilt.runs.rollout_store import RolloutTable

TEXTS = ["2 + 2 = 4", "你好，世界", "naïve café 🙂👍🏽 end", "a\x00b\u202ec\n\n  d", "", "<|end|>x"]


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes and no merges: every character beyond ASCII is split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the the cat the cat"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Pieces with ▁ for a space, and byte tokens for what is not in the vocabulary."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{b:02X}>": 2 + b for b in range(256)} | {"▁": 258, "▁the": 259, "a": 260, "b": 261}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    """A vocabulary whose spelling is not the text: WordPiece joins `##`."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "now": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cut_the_text_into_the_bytes_of_its_tokens(text: str) -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode(text)
    offsets = [*text_offsets(tokens, text, Spelling(tokenizer)), len(text.encode())]
    pieces = [text.encode()[a:b] for a, b in pairwise(offsets)]
    assert b"".join(pieces) == text.encode()
    for token, piece in zip(tokens, pieces, strict=True):
        known = tokenizer.decode([token])
        assert known.encode() == piece if "\ufffd" not in known else len(piece) == 1


def test_a_character_over_four_tokens_has_four_offsets_inside_it() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("a🙂b")
    assert len(tokens) == 6
    assert text_offsets(tokens, "a🙂b", Spelling(tokenizer)) == [0, 1, 2, 3, 4, 5]


def test_a_torn_character_stands_as_the_replacement_sign() -> None:
    tokenizer = byte_level()
    tokens = [*tokenizer.encode("a🙂")[:3], *tokenizer.encode("bc")]  # two of the four bytes, then text
    text = tokenizer.decode(tokens)
    assert text == "a\ufffdbc"
    assert text_offsets(tokens, text, Spelling(tokenizer)) == [0, 1, 1, 4, 5]


def test_special_tokens_left_out_of_the_text_have_no_width() -> None:
    tokenizer = byte_level()
    tokens = [*tokenizer.encode("ab"), tokenizer.eos_token_id]
    assert text_offsets(tokens, "ab", Spelling(tokenizer)) == [0, 1, 2]
    assert text_offsets(tokens, "ab<|end|>", Spelling(tokenizer)) == [0, 1, 2]


@pytest.mark.parametrize("ids, text, expected", [
    ([259, 260, 261], "theab", [0, 3, 4]),
    ([260, 259, 261], "a theb", [0, 1, 5]),
    ([260, 2 + 0xE4, 2 + 0xBD, 2 + 0xA0, 261], "a你b", [0, 1, 2, 3, 4]),
])  # fmt: skip
def test_offsets_of_pieces_with_byte_tokens(ids: list[int], text: str, expected: list[int]) -> None:
    tokenizer = sentencepiece_like()
    assert tokenizer.decode(ids) == text
    assert text_offsets(ids, text, Spelling(tokenizer)) == expected


def test_offsets_by_decoding_where_the_spelling_does_not_tell() -> None:
    tokenizer = words()
    assert tokenizer.decode([1, 2, 3]) == "playing now"
    assert text_offsets([1, 2, 3], "playing now", Spelling(tokenizer)) == [0, 4, 7]


def table(**changes: object) -> tuple[RolloutTable, PreTrainedTokenizerFast]:
    tokenizer = byte_level()
    first, second = tuple(tokenizer.encode("你")), tuple(tokenizer.encode("ok"))
    prompts = [Prompt((1, 2), 7), Prompt((3,), 9)]
    rollouts = [
        Rollout(prompts[0], first, (True, False, True), (-1.0, float("nan"), -2.0), "stop", Sampling(), 3, (0, 1, 7, 0)),
        Rollout(prompts[1], second, (True,) * 2, (-0.5, -0.25), "length", Sampling(), 3, (0, 1, 9, 0)),
    ]
    rewards = Rewards.of(torch.tensor([1.25, -0.5]), parts={"exact": torch.tensor([1.0, 0.0]), "length": torch.tensor([0.25, -0.5])})
    settings: dict[str, object] = {
        "rollouts": rollouts,
        "texts": [("p", "你"), ("q", "ok")],
        "rewards": rewards,
        "tokenizer": tokenizer,
        "sequences": {"advantage": torch.tensor([0.7, -0.7]), "dropped_reason": [None, None]},
        "actions": {"sampler_logprobs": torch.tensor([-1.0, -2.0, -0.5, -0.25]), "clip": torch.tensor([1, 0, -1, 2])},
        "run": "r",
    }
    return RolloutTable(**{**settings, **changes}), tokenizer  # type: ignore[arg-type]


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    rows, tokenizer = table()
    path = rollout_store.write(tmp_path / "rollouts", 120, rows)
    assert path.name == "step_000120.parquet" and rollout_store.stored(path.parent) == [120]
    a, b = rollout_store.read(path)
    assert (a["step"], a["run"], a["group_id"], a["rollout_id"], a["finish_reason"], a["weight_version"]) == (120, "r", 7, 0, "stop", 3)
    assert (a["prompt"], a["completion"], b["completion"]) == ("p", "你", "ok")
    assert a["reward"] == 1.25 and b["rewards"] == {"exact": 0.0, "length": -0.5} and b["truncated"] and not a["truncated"]
    assert a["ids"] == tokenizer.encode("你") and a["mask"] == [1, 0, 1] and a["text_offsets"] == [0, 1, 2]
    assert a["advantage"] == pytest.approx(0.7) and a["dropped_reason"] is None and a["seed"] == [0, 1, 7, 0]
    assert a["sampler_logprobs"][0] == -1 and np.isnan(a["sampler_logprobs"][1]) and a["sampler_logprobs"][2] == -2
    assert a["clip"] == [1, None, 0] and b["clip"] == [-1, 2]


def test_alternatives_come_back_per_sampled_token_of_the_rollouts_that_were_looked_at(tmp_path: Path) -> None:
    ids = torch.tensor([[97, 228], [228, 98], [-1, -1], [-1, -1]])
    said = torch.tensor([[-0.5, -1.0], [-0.25, -2.0], [torch.nan] * 2, [torch.nan] * 2])
    rows, tokenizer = table(alternatives=rollout_store.Alternatives(ids, said, 2 * said))
    a, b = rollout_store.read(rollout_store.write(tmp_path, 1, rows))
    assert a["topk_ids"] == [[97, 228], None, [228, 98]] and a["topk_logp"] == [[-0.5, -1.0], None, [-0.25, -2.0]]
    assert a["topk_ref"][0] == [-1.0, -2.0] and b["topk_ids"] is None and b["topk_text"] is None
    shown = [[Spelling(tokenizer).shown(i) for i in row] for row in ids[:2].tolist()]
    assert a["topk_text"] == [shown[0], None, shown[1]] and any(text.startswith("<") and len(text) == 4 for text in shown[0])
    (c, _) = rollout_store.read(
        rollout_store.write(tmp_path, 2, table(alternatives=rollout_store.Alternatives(ids, said, said * torch.nan))[0])
    )
    assert "topk_ref" not in c


def test_kept_sets_come_back_per_sampled_token(tmp_path: Path) -> None:
    """An answer with sets, one without, and a token that was not sampled; no column where nobody has any."""
    from tilt.kept import Kept

    rows, _ = table()
    narrowed = replace(rows.rollouts[0], kept=Kept.of([[3, 900_000], [4]]))
    a, b = rollout_store.read(rollout_store.write(tmp_path, 1, replace(rows, rollouts=[narrowed, rows.rollouts[1]])))
    assert a["kept"] == [[3, 900_000], [], [4]] and b["kept"] == [[], []]
    assert rollout_store.kept_of(a) == narrowed.kept and rollout_store.kept_of(b) is None
    c, _ = rollout_store.read(rollout_store.write(tmp_path, 2, rows))
    assert "kept" not in c and rollout_store.kept_of(c) is None


def test_the_file_states_its_schema(tmp_path: Path) -> None:
    path = rollout_store.write(tmp_path, 1, table()[0])
    schema = pq.read_schema(path)
    assert schema.metadata[b"schema_version"] == b"2"
    kinds = {
        name: str(schema.field(name).type.value_type) for name in ("ids", "text_offsets", "mask", "logprobs", "sampler_logprobs", "clip")
    }
    assert kinds == {
        "ids": "uint32",
        "text_offsets": "int32",
        "mask": "uint8",
        "logprobs": "float",
        "sampler_logprobs": "halffloat",
        "clip": "int8",
    }


def test_a_later_schema_is_refused(tmp_path: Path) -> None:
    path = rollout_store.write(tmp_path, 1, table()[0])
    pq.write_table(pq.read_table(path).replace_schema_metadata({"schema_version": "99"}), path)
    with pytest.raises(DataError, match="schema version 99"):
        rollout_store.read(path)


def test_channels_of_the_kept_rollouts_alone(tmp_path: Path) -> None:
    rows, _ = table(sequences={"dropped_reason": ["zero_variance", None]}, actions={"push": torch.tensor([0.5, -1e6])})
    a, b = rollout_store.read(rollout_store.write(tmp_path, 1, rows))
    assert a["dropped_reason"] == "zero_variance" and np.isnan(a["push"]).all()
    assert b["push"] == [0.5, -np.inf]


def test_a_rollout_that_could_not_be_scored_has_no_reward(tmp_path: Path) -> None:
    rewards = Rewards.of(torch.tensor([0.0, 1.0]), scored=torch.tensor([False, True]))
    a, b = rollout_store.read(rollout_store.write(tmp_path, 1, table(rewards=rewards)[0]))
    assert a["reward"] is None and b["reward"] == 1 and "rewards" not in a


def test_channels_of_another_length_are_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="3 values for 4 actions"):
        rollout_store.write(tmp_path, 1, table(actions={"push": torch.zeros(3)})[0])
    assert not list(tmp_path.iterdir())


def test_hostile_text_is_stored(tmp_path: Path) -> None:
    text = "</script>\x1b[31m\u202e\x00\ud800"
    a, _ = rollout_store.read(rollout_store.write(tmp_path, 1, table(texts=[(text, "你"), ("q", text)])[0]))
    assert a["prompt"] == text.replace("\ud800", "?")


def test_a_write_killed_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rollout_store.write(tmp_path, 1, table()[0])
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        rollout_store.write(tmp_path, 1, table(run="other")[0])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
