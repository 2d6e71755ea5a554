"""A tokenizer.model small enough to reason about."""

from __future__ import annotations

import base64
import json
from pathlib import Path

MERGES = [b"he", b"the", b" t", b" the", b"aa", b"aaaa", b"12", b"123", b"  ", "é".encode()]
"""What is merged, in this order, after the 256 single bytes."""


def write_tokenizer(path: Path, merges: list[bytes] = MERGES) -> Path:
    """Write a tokenizer.model as Meta's are: one token in base64 and its rank on each line."""
    tokens = [bytes([number]) for number in range(256)] + merges
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


TEXT = "The quick brown fox jumps over the lazy dog. Zażółć gęślą jaźń, 漢字 and 12345 numbers: 3.14!\n\tEnd."
"""What the small tokenizers below are trained on."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As ChatML, after a begin of text."""


def write_json_tokenizer(
    folder: Path, chat_template: str | None = CHAT_TEMPLATE, special: tuple[str, ...] = (), **settings: object
) -> Path:
    """Write a folder as transformers does: byte pairs in a tokenizer.json, and the settings beside it.

    Args:
        folder: Where to.
        chat_template: In the settings.
        special: More special tokens.
        settings: More of them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *special]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in names])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    found: dict[str, object] = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}
    if chat_template is not None:
        found["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(found | settings))
    return folder


def write_pieces(path: Path, **settings: object) -> Path:
    """Train a SentencePiece model with what Llama 2's was trained with: byte pairs, bytes for the rest, no changes."""
    import sentencepiece

    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT, "[INST] a question [/INST] an answer"] * 20),
            model_writer=file,
            vocab_size=400,
            minloglevel=2,
            **{
                "model_type": "bpe",
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "allow_whitespace_only_pieces": True,
                "split_digits": True,
                **settings,
            },
        )
    return path
