"""How do tests get a tiny random encoder of each family, with a real tokenizer, in a directory?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

HIDDEN_SIZE = 16
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
GOOD_WORDS = ("good", "great", "fine", "lovely")
BAD_WORDS = ("bad", "poor", "awful", "dull")
OTHER_WORDS = ("the", "a", "film", "plot", "was", "is", "very", "and", "actor", "story")
_MAX_TOKENS = 64


def make_model_dir(
    directory: Path, family: str = "bert", *, seed: int = 0, num_unused_tokens: int = 0
) -> Path:
    """A bare encoder of `family` (a key of FAMILIES) with random weights from `seed`, and its tokenizer.

    `num_unused_tokens` make it large, and training hardly slower.
    """
    tokenizer = make_tokenizer()
    config = FAMILIES[family](len(tokenizer) + num_unused_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # as large as in a trained model, so that features differ between texts
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(10.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer trained on the few words above; pairs as [CLS] a [SEP] b [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join((*GOOD_WORDS, *BAD_WORDS, *OTHER_WORDS))] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=_MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_texts(num_texts: int, *, seed: int = 0) -> tuple[list[str], list[int]]:
    """Texts of 2 to 12 words, and label 1 where the one word of sentiment among them is good."""
    generator = torch.Generator().manual_seed(seed)

    def draw(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    texts, labels = [], []
    for _ in range(num_texts):
        label = int(torch.randint(2, (1,), generator=generator))
        words = [draw(OTHER_WORDS) for _ in range(int(torch.randint(1, 12, (1,), generator=generator)))]
        words.insert(len(words) // 2, draw(GOOD_WORDS if label else BAD_WORDS))
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


def make_dataset(
    tokenizer: PreTrainedTokenizerBase, num_examples: int, *, seed: int = 0, is_regression: bool = False
) -> Dataset:
    """Tokenized as by `peer.data.tokenize`; the target of a regression is the label as a float."""
    texts, labels = make_texts(num_examples, seed=seed)
    encoded = tokenizer(texts, truncation=True, max_length=_MAX_TOKENS)
    columns = {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": [float(label) for label in labels] if is_regression else labels,
        "length": [len(ids) for ids in encoded["input_ids"]],
    }
    return Dataset.from_dict(columns)


def _bert(vocab_size: int) -> PretrainedConfig:
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=_MAX_TOKENS,
        pad_token_id=0,
    )


def _roberta(vocab_size: int) -> PretrainedConfig:
    return RobertaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=_MAX_TOKENS + 2,  # RoBERTa's positions start after the padding id
        type_vocab_size=1,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def _distilbert(vocab_size: int) -> PretrainedConfig:
    return DistilBertConfig(
        vocab_size=vocab_size,
        dim=HIDDEN_SIZE,
        n_layers=2,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=_MAX_TOKENS,
        pad_token_id=0,
    )


def _deberta_v2(vocab_size: int) -> PretrainedConfig:
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": _MAX_TOKENS,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_buckets": 8,
        "type_vocab_size": 0,
        "pooler_hidden_size": HIDDEN_SIZE,
        "pad_token_id": 0,
    }
    return DebertaV2Config(**options)


def _electra(vocab_size: int) -> PretrainedConfig:
    return ElectraConfig(
        vocab_size=vocab_size,
        embedding_size=8,  # differs from hidden_size, as in electra-small: there is a projection
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=_MAX_TOKENS,
        pad_token_id=0,
    )


def _modernbert(vocab_size: int) -> PretrainedConfig:
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": _MAX_TOKENS,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "classifier_pooling": "mean",
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
    }
    return ModernBertConfig(**options)


FAMILIES: dict[str, Callable[[int], PretrainedConfig]] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "deberta-v2": _deberta_v2,
    "electra": _electra,
    "modernbert": _modernbert,
}
