"""What is a run: its frozen specification, how it is read and written, and its digest.

The digest (sha256 of the canonical form) is part of every DHT key, every message and every
group, so two different specs never mix. It is also what a joiner trusts.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from coordinator.errors import SpecError

MAX_SPEC_BYTES = 64 * 1024
MAX_ADAM_LR = 0.1
MAX_MODEL_FILE_BYTES = 64 * 1024 * 1024
MODEL_FILE_SUFFIXES = (".json", ".txt", ".model")  # data only: never code, never pickle
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")  # of a file: no folders, no control characters

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MAX_INSTANT = 4e10  # in the year 3237; what is shown of an instant has a four-digit year, and a date at all
Instant = Annotated[float, Field(ge=0, le=MAX_INSTANT, allow_inf_nan=False)]  # seconds since 1970
LeaseSeconds = Annotated[float, Field(ge=5, le=3600, allow_inf_nan=False)]
MaxWeight = Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**53)]  # bounded, so that it converts to a float
Aggregation = Literal["mean", "clipped_mean", "trimmed_mean", "median", "disjoint_mean", "centered_clipping"]
# A key, written as libp2p writes the peer id of its holder.
Ed25519Id = Annotated[str, Field(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}$")]
PositiveSeconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelFile(_Frozen):
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0, le=MAX_MODEL_FILE_BYTES)]


class RunSpec(_Frozen):
    """Everything that all peers of a run must agree on."""

    format: Literal[2] = 2  # 2: manifests, ballots, rules and codecs of version 0.2
    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    created_at: Instant  # tells runs apart
    model: Annotated[str, Field(min_length=1, max_length=512)]  # hub id, or a path that only some peers have
    revision: Annotated[str, Field(max_length=128)] | None = None  # hub revision
    backbone_hash: Sha256  # state hash of round 0: the pretrained backbone
    num_parameters: Count  # of the backbone
    files: Annotated[dict[str, ModelFile], Field(min_length=1, max_length=32)]  # config and tokenizer
    num_rounds: Annotated[int, Field(ge=1, le=1_000_000)]  # the run ends with it, or with its roll-back
    round_examples: Count | None = None  # finetuning budget of a peer in a round
    round_seconds: PositiveSeconds | None = None  # the same, as time; the first to be reached ends it
    round_limit_seconds: PositiveSeconds = 1800.0  # a round closes this long after it could begin
    lease_seconds: LeaseSeconds = 30.0  # silence that means gone
    min_peers: Annotated[int, Field(ge=1, le=1024)] = 2  # a round is fused by at least so many
    max_peers: Annotated[int, Field(ge=1, le=1024)] = 64
    aggregation: Aggregation = "mean"  # the paper's is the mean
    screening: Literal["none", "norm", "cosine", "norm_cosine"] = "none"  # of whole contributions
    weights: Literal["uniform", "examples"] = "uniform"  # the paper's is uniform
    max_weight: MaxWeight = 4.0  # by examples: at most so many budgets
    compression: Literal["fp32", "fp16", "bf16", "int8", "int4", "topk"] = "fp32"  # of what travels
    outer_optimizer: Literal["plain", "nesterov", "adam"] = "plain"  # what is done with the fused delta
    outer_lr: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    outer_momentum: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.9  # Adam's beta1
    exchange_limit_seconds: PositiveSeconds = 600.0  # of one all-reduce, however slow a member may be
    audit_parts: Annotated[int, Field(ge=0, le=64)] = 2  # that each member computes again after a round
    gate: bool = True  # members judge each new state on held-out data of their own; peer/gate.py
    gate_level: Annotated[float, Field(gt=0, le=0.2)] = 0.01  # of a member's test: how often noise rejects
    gate_share: Annotated[float, Field(ge=0.5, lt=1)] = 0.5  # more than this share of the votes undoes it
    gate_min_voters: Annotated[int, Field(ge=2, le=1024)] = 2  # and more than half of the round's members
    gate_vote_seconds: PositiveSeconds = 60.0  # after a commit; who has not voted by then has accepted
    gate_leaves_out: Literal["none", "most_deviant"] = "most_deviant"  # of those who made an undone round
    gate_left_out_rounds: Annotated[int, Field(ge=1, le=1000)] = 3  # fusions that stand, without that peer
    gate_max_rollbacks: Annotated[int, Field(ge=1, le=100)] = 3  # in a row; then a round stands, worse or not
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    organizer: Ed25519Id | None = None  # whose invites let a peer in; None: a public run
    starter: Ed25519Id | None = None  # who began the run, and signs its first commit; None: nobody does

    @field_validator("files")
    @classmethod
    def _plain_data_files(cls, files: dict[str, ModelFile]) -> dict[str, ModelFile]:
        for name in files:
            if not _PLAIN_NAME.fullmatch(name) or not name.endswith(MODEL_FILE_SUFFIXES):
                raise ValueError(f"{name!r} is not the plain name of a config or tokenizer file")
        if "config.json" not in files:
            raise ValueError("config.json is missing from the files of the model")
        return files

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        if self.round_examples is None and self.round_seconds is None:
            raise ValueError("set round_examples or round_seconds (or both): a round needs a budget")
        if self.outer_optimizer == "adam" and self.outer_lr > MAX_ADAM_LR:
            raise ValueError(
                f"outer_lr {self.outer_lr:g} is too large for adam, where it is a length: about 0.001"
            )
        if self.min_peers > self.max_peers:
            raise ValueError(f"min_peers ({self.min_peers}) is larger than max_peers ({self.max_peers})")
        if self.round_seconds is not None and self.round_seconds > self.round_limit_seconds:
            raise ValueError("round_seconds is longer than round_limit_seconds: nobody could finish a round")
        return self

    def canonical(self) -> bytes:
        values = self.model_dump(mode="json")
        for later in ("organizer", "starter"):  # the digest of a run without is as it was before
            if values[later] is None:
                del values[later]
        return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """sha256 of the canonical form, 64 hex digits."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def contribution_weight(self, num_examples: int) -> float:
        """The weight of a signed number of examples: the paper's uniform 1, or by examples, capped.

        Never zero: a peer that had no time for a single example must not make the round impossible.
        """
        if self.weights == "uniform":
            return 1.0
        budget = self.round_examples or 1000
        return min(self.max_weight, max(1, num_examples) / budget)


def parse_spec(text: str | bytes, *, source: str) -> RunSpec:
    """Read a spec from TOML. Raises SpecError that names `source` and each wrong key."""
    if len(text) > MAX_SPEC_BYTES:
        raise SpecError(f"{source}: a run spec has at most {MAX_SPEC_BYTES} bytes, this has {len(text)}")
    try:
        values = tomllib.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:  # an entry point's spec is a stranger's text
        raise SpecError(f"{source}: not a TOML file: {error}") from error
    return validate_spec(values, source=source)


def validate_spec(values: dict[str, Any], *, source: str) -> RunSpec:
    try:
        return RunSpec.model_validate(values)
    except ValidationError as error:
        raise SpecError(f"{source}: {_explain(error)}") from error


def load_spec(path: Path) -> RunSpec:
    try:
        return parse_spec(path.read_bytes(), source=str(path))
    except OSError as error:
        raise SpecError(f"{path}: cannot read the run spec: {error.strerror}") from error


def _explain(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in problem["loc"])[:120]
        if problem["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r}")
        elif problem["type"] == "missing":
            problems.append(f"key {key!r} is missing")
        else:
            where = f"key {key!r}: " if key else ""
            problems.append(f"{where}{problem['msg'].removeprefix('Value error, ')}")
    return "the run spec is not valid: " + "; ".join(problems)
