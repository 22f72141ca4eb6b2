"""Folders of models, reward models, adapters and tokenizers with one file mutated: headers of safetensors, config.json, index.json, tokenizer.json."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hostile import Target, bounded, changed, mutated, put, values
from hypothesis import strategies as st

from tilt.data.rendering import renderer
from tilt.data.tokenizers import characters, train_bpe
from tilt.models import adapters, loading, saving
from tilt.models.policy import Policy, RewardModel

KEYS = [
    "hidden_size", "num_hidden_layers", "vocab_size", "auto_map", "architectures", "model_type", "rope_scaling", "rope_parameters", "torch_dtype", "dtype", "layer_types",
    "quantization_config", "attn_implementation", "transformers_weights", "head_dim", "tie_word_embeddings", "chat_template", "eos_token", "added_tokens", "r", "rank_pattern",
]  # fmt: skip
FILES = {
    "llm": ["config.json", "model.safetensors", "generation_config.json"],
    "gpt2": ["config.json", "model.safetensors"],
    "sharded": ["model.safetensors.index.json", "config.json", "model-00001-of-00002.safetensors"],
    "reward": ["config.json", "model.safetensors"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors"],
    "words": ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
}


@cache
def folders() -> dict[str, Path]:
    """Good folders by name, written once a process."""
    root = Path(tempfile.mkdtemp(prefix="tilt-fuzz-"))
    words = train_bpe(["a b c"] * 4, 270)
    shape = {"vocabulary": 272, "width": 16, "layers": 1, "heads": 2, "context": 32}
    for name, kind in (("llm", "qwen3"), ("gpt2", "gpt2")):
        saving.save(loading.tiny(kind, **shape), words, root / name)
    lm = loading.tiny(**shape)
    lm.save_pretrained(root / "sharded", max_shard_size="20KB")
    words.save_pretrained(root / "sharded")
    saving.save(RewardModel.from_policy(Policy(loading.tiny(**shape)), padding=0).model, words, root / "reward")
    adapters.save_adapter(adapters.add_lora(loading.tiny(**shape), 2, 4.0), root / "adapter", base=str(root / "llm"))
    characters("abc").save_pretrained(root / "words")
    return {name: root / name for name in FILES}


def checkpoint(example: tuple[str, str, bytes], folder: Path) -> None:
    kind, file, content = example
    place = folder / "model"
    shutil.copytree(folders()[kind], place)
    put(place / file, content)
    if kind == "words":
        with bounded():
            _speak(loading.read_tokenizer(place))
        return
    with bounded():
        if kind == "reward":
            loading.load_process_model(place)
        else:
            _speak(loading.load(place)[1])


def _speak(words: Any) -> None:
    """Render a conversation and a text."""
    for template in ("auto", "plain", "text"):
        with bounded():
            render: Any = renderer(words, template)
            render.demonstration({"prompt": "a b", "completion": "c\u00e9"}, 0)
            assert render.stop_ids
    words.decode([0, 1, 2])


@st.composite
def contents(draw: st.DrawFn, kind: str) -> tuple[str, str, bytes]:
    """A file of the folder with its new bytes: JSON with other values, or bytes cut and flipped; of weights mostly the header."""
    file = draw(st.sampled_from([name for name in FILES[kind] if (folders()[kind] / name).exists()]))
    good = (folders()[kind] / file).read_bytes()
    if file.endswith(".safetensors"):
        end = 8 + int.from_bytes(good[:8], "little")
        return kind, file, draw(mutated([good[:end]])) + good[end : draw(st.sampled_from([len(good), len(good), len(good) - 1, end]))]
    if file.endswith(".json") and draw(st.booleans()):
        return kind, file, json.dumps(draw(changed(json.loads(good), values(KEYS)))).encode()
    return kind, file, draw(mutated([good]))


TARGETS = tuple(
    Target(f"checkpoints: {name}", contents(kind), checkpoint, 12)
    for name, kind in (
        ("a language model", "llm"), ("another architecture", "gpt2"), ("weights in parts", "sharded"), ("a reward model", "reward"), ("an adapter", "adapter"), ("a tokenizer", "words"),
    )
)  # fmt: skip
