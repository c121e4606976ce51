"""Which parameters are the shared backbone, which are a peer's private head, and how both come and go.

The backbone is the parameters (not the buffers: position ids and the like are constants that
every peer derives from the config) of `model.base_model`, tied ones once, under their names
relative to `base_model`. A pooler inside `base_model` (BERT) does not belong to it: like the
dense layer in RoBERTa's head it sits between the encoder and the last Linear, is trained for
one task, and most encoders have none. So it is private, as the rest of the head is, and a
fused model is a bare encoder in every family. Parameters are matched by name, never by order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from coordinator.errors import ModelError, UsageError
from peer.layout import TensorLayout, flat_bytes
from peer.stopping import ends_at_once
from peer.tasks import Task

# What a model needs besides its weights. An explicit list: what peers serve to each other
# must hold no code, no pickle and nothing private that happens to lie in the same directory.
MODEL_FILE_NAMES = (
    "added_tokens.json",
    "config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# One of these must be there: without, transformers 5 makes a tokenizer with an empty vocabulary.
_VOCABULARY_FILE_NAMES = (
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_WEIGHT_FILE_PATTERNS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# What a directory says of whoever made it: label names, and where it lay. Loading needs none of it.
_PRIVATE_KEYS = {
    "config.json": ("_name_or_path", "finetuning_task", "id2label", "label2id", "problem_type"),
    "tokenizer_config.json": ("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file"),
}
_POOLER_PREFIX = "pooler."
# Bias of the dense layer in heads whose activation cuts off below zero (ReLU, GELU): it moves the
# features, of size about 0.4, to where the activation is nearly linear. See reset_head.
_DENSE_BIAS = {"distilbert": 1.0, "electra": 1.0}
_HUB_TIMEOUT_SECONDS = 10.0  # for one answer of the hub, not for a whole download


@dataclass(frozen=True)
class FileEntry:
    sha256: str  # of the whole file, hex
    size_bytes: int


# ---- backbone -----------------------------------------------------------------------------


def load_backbone(model_dir: Path) -> tuple[TensorLayout, torch.Tensor]:
    """The pretrained backbone: its layout and its (num_values,) float32 CPU vector.

    Raises ModelError when `model_dir` is not a usable encoder with safetensors weights, or
    when a weight of the backbone is missing from the file or not finite.
    """
    config = _load_config(model_dir)
    model = _from_pretrained(AutoModel, model_dir, config)
    parameters = backbone_parameters(model)
    layout = TensorLayout.of(parameters)
    flat = layout.flatten(parameters)
    if not torch.isfinite(flat).all():
        raise ModelError(
            f"the weights in {model_dir} hold NaN or infinite values; get an intact copy of the model"
        )
    return layout, flat


def backbone_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The shared parameters by name relative to `base_model`; for classifiers and bare encoders alike."""
    return {
        name: parameter
        for name, parameter in model.base_model.named_parameters()  # a tied parameter appears once
        if not name.startswith(_POOLER_PREFIX)
    }


def export_backbone(model: PreTrainedModel, layout: TensorLayout | None = None) -> torch.Tensor:
    """(num_values,) float32 copy on the CPU. Raises ModelError when the model does not have `layout`."""
    parameters = backbone_parameters(model)
    layout = layout or TensorLayout.of(parameters)
    _check_layout(parameters, layout)
    return layout.flatten(parameters)


@torch.no_grad()
def import_backbone(model: PreTrainedModel, layout: TensorLayout, flat: torch.Tensor) -> None:
    """Copies `flat` (num_values,) into the model in place, by name. Raises ModelError on any mismatch,
    before anything is written."""
    parameters = backbone_parameters(model)
    _check_layout(parameters, layout)
    if flat.shape != (layout.num_values,):
        raise ModelError(
            f"the backbone has {layout.num_values} values, the vector given has shape {tuple(flat.shape)}"
        )
    for name, view in layout.unflatten(flat).items():
        parameters[name].copy_(view)


# ---- classifier and its head --------------------------------------------------------------


def load_classifier(
    model_dir: Path, task: Task, *, seed: int, backbone: tuple[TensorLayout, torch.Tensor] | None = None
) -> PreTrainedModel:
    """An fp32 classifier (or regressor) for `task` on the CPU, in eval mode, its head drawn from `seed`.

    Without `backbone` the weights of `model_dir` are loaded; with it they come from the flat
    vector, and `model_dir` needs only the config. Both give the same bits for the same
    weights and seed. Raises ModelError.
    """
    config = _classifier_config(model_dir, task)
    if backbone is None:
        model = _from_pretrained(AutoModelForSequenceClassification, model_dir, config)
    else:
        model = _from_config(AutoModelForSequenceClassification, model_dir, config)
        import_backbone(model, *backbone)
    _check_classifier(model, model_dir)
    reset_head(model, seed)
    model.eval()
    return model


def head_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Everything trainable that is not backbone (a pooler included), by its name in `model`."""
    shared = {id(parameter) for parameter in backbone_parameters(model).values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in shared}


def head_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """CPU clones of the head's parameters."""
    return {name: parameter.detach().cpu().clone() for name, parameter in head_parameters(model).items()}


@torch.no_grad()
def load_head_state(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> None:
    """Inverse of `head_state`, in place. Raises ModelError when names or shapes differ."""
    parameters = head_parameters(model)
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if given != expected:
        raise ModelError(f"the saved head does not fit this model: {_first_difference(expected, given)}")
    for name, tensor in state.items():
        parameters[name].copy_(tensor)


@torch.no_grad()
def reset_head(model: PreTrainedModel, seed: int) -> None:
    """Draws a new head from `seed`; the same numbers whatever state the model or torch's generator is in.

    The last Linear is N(0, 0.02) as in transformers. A dense layer before it (pooler, RoBERTa's
    `classifier.dense`) is a random rotation instead: the probe is fitted on what comes out of
    it, and a Gaussian n x n matrix has singular values down to about 1/n of the largest, which
    loses directions of the features that a rotation keeps. Measured on all-MiniLM-L6-v2, 800
    training rows, sst2 / ag_news: first token 76.2 / 83.8 without a dense layer; through tanh
    70.2 / 80.0 with a Gaussian, 75.0 / 83.6 with a rotation; through ReLU 65.4 / 80.4 with a
    rotation alone, 74.8 / 83.8 with a bias of 1.
    """
    generator = torch.Generator().manual_seed(seed)
    last = final_linear(model)
    dense_bias = _DENSE_BIAS.get(model.config.model_type, 0.0)
    head = {id(parameter) for parameter in head_parameters(model).values()}
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) in head]
        if own:
            _reset_module(module, own, generator, dense_bias=None if module is last else dense_bias)


def final_linear(model: PreTrainedModel) -> nn.Linear:
    """The last Linear of the head, one output per label. Raises ModelError when there is none."""
    head = {id(parameter) for parameter in head_parameters(model).values()}
    candidates = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and id(module.weight) in head
        and module.out_features == model.config.num_labels
        and module.bias is not None
    ]
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no classification head that ends in a Linear with a bias"
        )
    return candidates[-1]


# ---- files --------------------------------------------------------------------------------


def resolve_model(name: str, revision: str | None) -> Path:
    """The directory of a model: `name` itself when it is one, else a download from the Hugging Face hub
    (config, tokenizer and safetensors only). Raises ModelError that says what to do."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"no model directory at {name}; give a directory that holds config.json, or a hub id"
        )
    return _download(name, revision)


def check_revision(name: str, revision: str | None) -> None:
    """Raises UsageError where it would mean nothing."""
    if revision is not None and Path(name).expanduser().exists():
        why = f"give its id: {name} is a folder here"
        raise UsageError(f"--revision {revision} is of a model on the hub; {why}")


def name_in_spec(name: str) -> str:
    """A directory by a path that nobody takes for a hub id: the others, who do not have it, read it, too."""
    is_plain = not name.startswith(("/", ".", "~"))
    return f"./{name}" if is_plain and Path(name).is_dir() else name


def model_files(model_dir: Path) -> dict[str, FileEntry]:
    """Hash and size of the config and tokenizer files that are there, by name (MODEL_FILE_NAMES only).

    Of their `shared_bytes`. Raises ModelError when there is no config.json.
    """
    if not (model_dir / "config.json").is_file():
        raise ModelError(f"{model_dir} holds no config.json; give the directory of a transformers model")
    present = [name for name in MODEL_FILE_NAMES if (model_dir / name).is_file()]
    contents = {name: shared_bytes(model_dir / name) for name in present}
    return {
        name: FileEntry(hashlib.sha256(content).hexdigest(), len(content))
        for name, content in contents.items()
    }


def shared_bytes(file: Path) -> bytes:
    """What a run shares of a model's file: without label names, and without where its maker kept it.

    The same bytes from the same file on every machine; those of the file where there is nothing to leave out.
    """
    content = file.read_bytes()
    try:
        values = json.loads(content) if file.name in _PRIVATE_KEYS else None
    except ValueError:  # told where the model is loaded
        return content
    if not isinstance(values, dict) or values.keys().isdisjoint(_PRIVATE_KEYS[file.name]):
        return content
    shared = {key: value for key, value in values.items() if key not in _PRIVATE_KEYS[file.name]}
    return (json.dumps(shared, indent=2, sort_keys=True) + "\n").encode()


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """Its `model_max_length` is at most what the model has positions for: many tokenizers set none.

    Raises ModelError when `model_dir` holds no tokenizer that loads without foreign code.
    """
    if not any((model_dir / name).is_file() for name in _VOCABULARY_FILE_NAMES):
        raise ModelError(
            f"{model_dir} holds no tokenizer: it needs one of {', '.join(_VOCABULARY_FILE_NAMES)}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"the tokenizer in {model_dir} does not load ({_one_line(error)}); "
            "its files must be of a family that transformers knows without foreign code"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"{model_dir} holds no tokenizer for text")
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer in {model_dir} has no padding token, so it cannot make batches")
    tokenizer.model_max_length = min([tokenizer.model_max_length, *_num_positions(model_dir)])
    return tokenizer


def encoder_shape(model_dir: Path) -> dict[str, int]:
    """What the config says of these, under the names that transformers gives to all families.

    Raises ModelError.
    """
    config = _load_config(model_dir)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    found = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, int) and value > 0}


def export_model(model_dir: Path, layout: TensorLayout, flat: torch.Tensor, output_dir: Path) -> None:
    """Writes the fused encoder in Hugging Face form: config, tokenizer, model.safetensors.

    `AutoModel.from_pretrained(output_dir)` gives the backbone bit for bit. Nothing private is
    written: no head, no label names, no pooler (transformers draws a new one where the class has it). The
    model is never built here; `flat` goes to the file as it is, without a copy.
    """
    config = _load_config(model_dir)
    with torch.device("meta"):  # names and shapes without memory
        encoder = _from_config(AutoModel, model_dir, config)
    _check_layout(backbone_parameters(encoder), layout)
    output_dir.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(encoder).__name__]
    config.dtype = torch.float32
    config.save_pretrained(output_dir)
    load_tokenizer(model_dir).save_pretrained(output_dir)
    for name in _PRIVATE_KEYS:
        (output_dir / name).write_bytes(shared_bytes(output_dir / name))
    _write_safetensors(output_dir / "model.safetensors", layout, flat)


def save_task_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: Path) -> None:
    """Writes this peer's own classifier, private head and label names included, ready for `pipeline`."""
    with _quiet_transformers():
        model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def load_saved_classifier(directory: Path) -> PreTrainedModel:
    """What `save_task_model` wrote, in fp32 on the CPU. Raises ModelError."""
    return _from_pretrained(AutoModelForSequenceClassification, directory, _load_config(directory))


# ---- helpers ------------------------------------------------------------------------------


def _check_layout(parameters: Mapping[str, torch.Tensor], layout: TensorLayout) -> None:
    own = TensorLayout.of(parameters)
    if own != layout:
        expected = dict(zip(layout.names, layout.shapes, strict=True))
        given = dict(zip(own.names, own.shapes, strict=True))
        raise ModelError(f"the model does not have the run's backbone: {_first_difference(expected, given)}")


def _first_difference(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> str:
    for name in sorted({*expected, *given}):
        if expected.get(name) != given.get(name):
            return f"{name} should be {expected.get(name, 'absent')} and is {given.get(name, 'absent')}"
    return "no difference"


def _reset_module(
    module: nn.Module, parameters: list[nn.Parameter], generator: torch.Generator, dense_bias: float | None
) -> None:
    """`dense_bias` is None for the last Linear."""
    is_dense = isinstance(module, nn.Linear) and dense_bias is not None
    for parameter in parameters:
        value = torch.zeros(parameter.shape)  # drawn on the CPU and copied: a GPU gets the same numbers
        if is_dense and parameter is module.weight:
            nn.init.orthogonal_(value, generator=generator)
        elif is_dense:
            value.fill_(dense_bias or 0.0)
        elif parameter.ndim >= 2:
            nn.init.normal_(value, std=0.02, generator=generator)
        elif parameter is getattr(module, "weight", None):  # the scale of a norm layer
            value.fill_(1.0)
        parameter.copy_(value)


def _classifier_config(model_dir: Path, task: Task) -> PretrainedConfig:
    config = _load_config(model_dir)
    labels = task.label_names or ("LABEL_0",)
    config.id2label = dict(enumerate(labels))  # num_labels follows from it
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = "regression" if task.kind == "regression" else "single_label_classification"
    return config


def _load_config(model_dir: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"no usable config.json in {model_dir} ({_one_line(error)}); "
            "the model must be of a family that transformers knows without foreign code"
        ) from error
    if not isinstance(config, PretrainedConfig):
        raise ModelError(f"{model_dir}/config.json is not the config of a transformers model")
    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        raise ModelError(f"{model_dir} holds a {config.model_type} decoder; only encoders can be fused here")
    return config


def _num_positions(model_dir: Path) -> list[int]:
    """Of the longest text that its tables of absolute positions allow; empty for relative and rotary ones."""
    config = _load_config(model_dir)
    with torch.device("meta"):  # shapes without memory
        model = _from_config(AutoModel, model_dir, config)
    found = [
        # RoBERTa and its kin number the tokens from behind the padding id on
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in model.named_modules()
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(table, nn.Embedding)
    ]
    said = getattr(config, "max_position_embeddings", None)
    return [min(found[0], said) if isinstance(said, int) else found[0]] if found else []


def _from_pretrained(auto_class: Any, model_dir: Path, config: PretrainedConfig) -> PreTrainedModel:
    try:
        with _quiet_transformers():
            model, info = auto_class.from_pretrained(
                model_dir,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # a foreign head may differ; the backbone is checked below
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the model in {model_dir} does not load ({_one_line(error)}); it needs model.safetensors "
            "of an encoder (pickled .bin weights are never read: convert them with save_pretrained)"
        ) from error
    assert isinstance(model, PreTrainedModel)
    _check_all_loaded(model, info, model_dir)
    return model


def _check_all_loaded(model: PreTrainedModel, info: Mapping[str, Any], model_dir: Path) -> None:
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    absent = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    broken = sorted(name for name in backbone_parameters(model) if prefix + name in absent)
    if broken:
        raise ModelError(
            f"the weights in {model_dir} lack {len(broken)} tensors of the backbone, or give them another "
            f"shape (first: {broken[0]}); config.json and model.safetensors do not belong together"
        )


def _from_config(auto_class: Any, model_dir: Path, config: PretrainedConfig) -> PreTrainedModel:
    try:
        # The random weights are all replaced; the generator of the process stays as it was.
        with torch.random.fork_rng(devices=[]):
            model = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"no encoder can be built from {model_dir}/config.json ({_one_line(error)})"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


def _check_classifier(model: PreTrainedModel, model_dir: Path) -> None:
    if model.base_model is model:
        raise ModelError(f"{model_dir}: {type(model).__name__} has no base_model, so no backbone to share")
    final_linear(model)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No load report and no progress bar: that the head is missing from the file is what we expect."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _download(name: str, revision: str | None) -> Path:
    try:
        with ends_at_once():  # what has come stays in the hub's cache, and the next download goes on there
            found = snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*MODEL_FILE_NAMES, *_WEIGHT_FILE_PATTERNS],
                etag_timeout=_HUB_TIMEOUT_SECONDS,
            )
    except GatedRepoError as error:
        raise ModelError(f"{name} is gated: accept its terms on the hub, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model {name} (or it is private: `hf auth login`)") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"the model {name} has no revision {revision}") from error
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a directory nor a hub id ({_one_line(error)})") from error
    except OSError as error:  # no network, no answer, disk full
        raise ModelError(
            f"{name} is no local directory and could not be downloaded ({_one_line(error)}); "
            "check the network, or give the path of a copy"
        ) from error
    return Path(found)


def _write_safetensors(path: Path, layout: TensorLayout, flat: torch.Tensor) -> None:
    """A safetensors file is a header (JSON, its length first) and the tensors in row-major order: our flat
    vector as it is. `safetensors.torch.save_file` would hold a second copy of every tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, view in layout.unflatten(flat).items():
        stop = start + view.numel() * view.element_size()
        header[name] = {"dtype": "F32", "shape": list(view.shape), "data_offsets": [start, stop]}
        start = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts at a multiple of 8
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        file.write(flat_bytes(flat))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
