"""Do backbone and head split, travel and come back bit for bit, in every encoder family?"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel, T5Config, pipeline

from coordinator.errors import ModelError
from peer.data import tokenize
from peer.layout import TensorLayout
from peer.model import (
    backbone_parameters,
    export_backbone,
    export_model,
    final_linear,
    head_parameters,
    head_state,
    import_backbone,
    load_backbone,
    load_classifier,
    load_head_state,
    load_tokenizer,
    model_files,
    reset_head,
    resolve_model,
    save_task_model,
    shared_bytes,
)
from peer.tasks import Task
from tests.tiny_models import FAMILIES, HIDDEN_SIZE, make_model_dir

TASK = Task(kind="classification", is_pair=False, label_names=("grim", "happy", "neutral"))
REGRESSION = Task(kind="regression", is_pair=True, label_names=())


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_model_dir(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def bert_dir(model_dirs: dict[str, Path]) -> Path:
    return model_dirs["bert"]


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_and_head_are_all_parameters_and_do_not_overlap(
    family: str, model_dirs: dict[str, Path]
) -> None:
    model = load_classifier(model_dirs[family], TASK, seed=0)
    backbone, head = backbone_parameters(model), head_parameters(model)
    assert len(backbone) + len(head) == len(list(model.parameters()))
    assert not {id(p) for p in backbone.values()} & {id(p) for p in head.values()}
    assert not any("pooler" in name or "position_ids" in name for name in backbone)
    assert final_linear(model).weight.shape == (3, HIDDEN_SIZE)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_from_the_file_and_from_a_flat_vector_give_the_same_classifier(
    family: str, model_dirs: dict[str, Path]
) -> None:
    layout, flat = load_backbone(model_dirs[family])
    from_file = load_classifier(model_dirs[family], TASK, seed=3)
    from_vector = load_classifier(model_dirs[family], TASK, seed=3, backbone=(layout, flat))
    assert torch.equal(export_backbone(from_file, layout), flat)
    states = from_file.state_dict(), from_vector.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_model_is_the_backbone_bit_for_bit(
    family: str, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    layout, flat = load_backbone(model_dirs[family])
    changed = flat + torch.randn(flat.shape, generator=torch.Generator().manual_seed(1))
    export_model(model_dirs[family], layout, changed, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(layout.flatten(backbone_parameters(loaded)), changed)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    original = load_tokenizer(model_dirs[family])("the film was good")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)("the film was good")["input_ids"] == original
    assert load_backbone(tmp_path)[0] == layout  # and it can start another run


@pytest.mark.parametrize("family", FAMILIES)
def test_task_model_works_in_a_pipeline_with_its_own_label_names(
    family: str, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    model = load_classifier(model_dirs[family], TASK, seed=0)
    save_task_model(model, load_tokenizer(model_dirs[family]), tmp_path)
    classify: Any = pipeline("text-classification", model=str(tmp_path), device="cpu")
    assert classify("the plot was dull")[0]["label"] in TASK.label_names
    (answers,) = classify(["the plot was dull"], top_k=None)
    assert {answer["label"] for answer in answers} == set(TASK.label_names)


def test_a_fused_model_holds_nothing_private(bert_dir: Path, tmp_path: Path) -> None:
    model = load_classifier(bert_dir, TASK, seed=0)
    layout = TensorLayout.of(backbone_parameters(model))
    export_model(bert_dir, layout, export_backbone(model), tmp_path)
    header_size = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "model.safetensors").read_bytes()[8 : 8 + header_size])
    assert set(header) == {"__metadata__", *layout.names}
    assert "grim" not in (tmp_path / "config.json").read_text()


def test_a_classifier_as_a_base_keeps_its_label_names_to_itself(bert_dir: Path, tmp_path: Path) -> None:
    base, output = tmp_path / "ward 3", tmp_path / "fused"
    save_task_model(load_classifier(bert_dir, TASK, seed=0), load_tokenizer(bert_dir), base)
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        values = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(values | {key: "clinic/own"}))
    assert "grim" in (base / "config.json").read_text()
    files = model_files(base)
    layout, flat = load_backbone(base)
    export_model(base, layout, flat, output)
    for name in ("config.json", "tokenizer_config.json"):
        shared = shared_bytes(base / name)
        assert files[name].sha256 == hashlib.sha256(shared).hexdigest()
        assert files[name].size_bytes == len(shared)
        for content in (shared, (output / name).read_bytes()):
            assert not any(word in content for word in (b"grim", b"clinic", b"ward"))
        (base / name).write_bytes(shared)
        assert shared_bytes(base / name) == shared  # of what is left there is nothing to leave out
    assert load_classifier(base, TASK, seed=0).config.num_labels == 3
    (base / "config.json").write_text("[1]")
    assert shared_bytes(base / "config.json") == b"[1]"  # told where it is loaded


def test_import_refuses_another_layout_and_changes_nothing(model_dirs: dict[str, Path]) -> None:
    model = load_classifier(model_dirs["bert"], TASK, seed=0)
    before = export_backbone(model)
    layout, flat = load_backbone(model_dirs["roberta"])
    with pytest.raises(ModelError, match="embeddings"):
        import_backbone(model, layout, flat)
    with pytest.raises(ModelError, match="values"):
        import_backbone(model, TensorLayout.of(backbone_parameters(model)), before[:-1])
    with pytest.raises(ModelError, match="backbone"):
        export_backbone(model, layout)
    assert torch.equal(export_backbone(model), before)


def test_export_is_a_copy(bert_dir: Path) -> None:
    model = load_classifier(bert_dir, TASK, seed=0)
    layout = TensorLayout.of(backbone_parameters(model))
    flat = export_backbone(model, layout)
    import_backbone(model, layout, torch.zeros_like(flat))
    assert flat.abs().sum() > 0
    assert export_backbone(model, layout).abs().sum() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_head_comes_from_its_seed_alone(family: str, model_dirs: dict[str, Path]) -> None:
    model = load_classifier(model_dirs[family], TASK, seed=5)
    first = head_state(model)
    torch.manual_seed(99)
    reset_head(model, 6)
    second = head_state(model)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    reset_head(model, 5)
    third = head_state(model)
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_dense_layer_of_the_head_is_a_rotation(model_dirs: dict[str, Path]) -> None:
    model = load_classifier(model_dirs["roberta"], TASK, seed=0)
    weight = head_parameters(model)["classifier.dense.weight"].detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(HIDDEN_SIZE))
    distilbert = load_classifier(model_dirs["distilbert"], TASK, seed=0)
    assert head_parameters(distilbert)["pre_classifier.bias"].tolist() == [1.0] * HIDDEN_SIZE


def test_loading_leaves_the_random_state_alone(bert_dir: Path) -> None:
    backbone = load_backbone(bert_dir)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load_classifier(bert_dir, TASK, seed=0, backbone=backbone)
    assert torch.equal(torch.rand(1), expected)


def test_head_state_goes_and_comes_back(bert_dir: Path) -> None:
    model = load_classifier(bert_dir, TASK, seed=1)
    state = head_state(model)
    reset_head(model, 2)
    assert not torch.equal(head_state(model)["classifier.weight"], state["classifier.weight"])
    load_head_state(model, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in head_state(model).items())
    with pytest.raises(ModelError, match=r"classifier\.bias"):
        load_head_state(model, {name: tensor for name, tensor in state.items() if name != "classifier.bias"})


def test_config_names_labels_and_problem(bert_dir: Path) -> None:
    config = load_classifier(bert_dir, TASK, seed=0).config
    assert config.id2label == {0: "grim", 1: "happy", 2: "neutral"}
    assert config.label2id == {"grim": 0, "happy": 1, "neutral": 2}
    assert config.problem_type == "single_label_classification"
    regressor = load_classifier(bert_dir, REGRESSION, seed=0)
    assert regressor.config.num_labels == 1
    assert regressor.config.problem_type == "regression"


def test_half_precision_files_are_held_in_fp32(bert_dir: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(bert_dir, dtype=torch.bfloat16).save_pretrained(tmp_path)
    layout, flat = load_backbone(tmp_path)
    assert flat.dtype == torch.float32
    model = load_classifier(tmp_path, TASK, seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(export_backbone(model, layout), flat)


def test_model_files_are_the_listed_ones_only(bert_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((bert_dir / name).read_bytes())
    for name in ("modeling_evil.py", "pytorch_model.bin", "labels.json", "README.md", "model.safetensors"):
        (tmp_path / name).write_text("private or harmful")
    files = model_files(tmp_path)
    assert set(files) == {"config.json", "tokenizer.json"}
    content = (tmp_path / "config.json").read_bytes()
    assert files["config.json"].sha256 == hashlib.sha256(content).hexdigest()
    assert files["config.json"].size_bytes == len(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        model_files(tmp_path / "absent")


def test_pickled_weights_are_never_read(bert_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((bert_dir / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(ModelError, match="safetensors"):
        load_backbone(tmp_path)


def test_foreign_code_is_never_run(bert_dir: Path, tmp_path: Path) -> None:
    marker = tmp_path / "was_run"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="without foreign code"):
        load_backbone(tmp_path)
    assert not marker.exists()


def test_weights_of_another_shape_or_missing_are_refused(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_dirs["bert"] / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ModelError, match="do not belong together"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"encoder\.layer\.2"):
        load_classifier(tmp_path, TASK, seed=0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ModelError, match="does not load"):
        load_backbone(tmp_path)


def test_non_finite_weights_are_refused(bert_dir: Path, tmp_path: Path) -> None:
    layout, flat = load_backbone(bert_dir)
    flat[7] = float("nan")
    export_model(bert_dir, layout, flat, tmp_path)
    with pytest.raises(ModelError, match="NaN"):
        load_backbone(tmp_path)


def test_decoders_are_refused(bert_dir: Path, tmp_path: Path) -> None:
    T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=4, vocab_size=20).save_pretrained(
        tmp_path / "t5"
    )
    with pytest.raises(ModelError, match="only encoders"):
        load_backbone(tmp_path / "t5")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20, n_positions=8))
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="Linear with a bias"):
        load_classifier(tmp_path / "gpt2", TASK, seed=0)


class StallingHub(BaseHTTPRequestHandler):
    """A hub with one model, whose weights begin to come and then do not go on."""

    is_stalled = threading.Event()

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in (("ETag", '"1"'), ("X-Repo-Commit", "1" * 40), ("Content-Length", str(10**9))):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        if "/api/" in self.path:
            tree = [{"type": "file", "path": "model.safetensors", "size": 10**9, "oid": "1" * 40}]
            model = {"id": "a/b", "sha": "1" * 40, "siblings": [{"rfilename": "model.safetensors"}]}
            body = json.dumps(tree if "/tree/" in self.path else model).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.do_HEAD()
        self.wfile.write(b"0" * 1000)
        self.wfile.flush()
        self.is_stalled.set()
        self.rfile.read(1)  # until the other end is gone


DOWNLOAD = """
from peer.model import resolve_model
from peer.stopping import StopSwitch
with StopSwitch({max_seconds}).listening():
    resolve_model("a/b", None)
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("number", "max_seconds", "exit_code"),
    [
        (signal.SIGINT, None, 130),
        pytest.param(signal.SIGTERM, None, 143, marks=pytest.mark.slow),
        pytest.param(None, 8.0, 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_or_the_time_limit_ends_a_download(
    tmp_path: Path, number: signal.Signals | None, max_seconds: float | None, exit_code: int
) -> None:
    """The hub's library waits for its threads, and they for the hub; only SIGKILL ended it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), StallingHub) as hub:
        StallingHub.is_stalled.clear()
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path)}
        env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "100"}
        command = [sys.executable, "-c", DOWNLOAD.format(max_seconds=max_seconds)]
        with subprocess.Popen(command, env=env) as process:
            try:
                assert StallingHub.is_stalled.wait(100.0)  # a busy machine imports torch for so long
                if number is not None:
                    process.send_signal(number)
                assert process.wait(timeout=(max_seconds or 0.0) + 10.0) == exit_code
            finally:
                process.kill()
                hub.shutdown()


@pytest.mark.parametrize(
    ("family", "most"), [("bert", 64), ("roberta", 65), ("distilbert", 64), ("electra", 64)]
)
def test_a_text_gets_no_more_tokens_than_the_model_has_positions(
    model_dirs: dict[str, Path], tmp_path: Path, family: str, most: int
) -> None:
    """RoBERTa's 66 begin behind the padding id, here 0."""
    directory = without_max_length(model_dirs[family], tmp_path)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.model_max_length == most
    texts = Dataset.from_dict({"text": ["the film was good " * 40], "label": [1]})
    rows = tokenize(texts, tokenizer, 512, is_pair=False)
    assert rows["length"] == [most]
    model = AutoModel.from_pretrained(directory)
    model(torch.tensor(rows["input_ids"]), torch.tensor(rows["attention_mask"]))  # no RuntimeError


def test_relative_and_rotary_positions_set_no_limit(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    for family in ("deberta-v2", "modernbert"):
        directory = without_max_length(model_dirs[family], tmp_path / family)
        assert load_tokenizer(directory).model_max_length > 10**6


def without_max_length(model_dir: Path, copy: Path) -> Path:
    """As the tokenizers of many models are published."""
    shutil.copytree(model_dir, copy, dirs_exist_ok=True)
    file = copy / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    return copy


def test_missing_tokenizer_is_told(bert_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((bert_dir / "config.json").read_bytes())
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_resolve_model(bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(bert_dir), None) == bert_dir
    with pytest.raises(ModelError, match="no model directory"):
        resolve_model(str(tmp_path / "absent"), None)
    with pytest.raises(ModelError, match="neither a directory nor a hub id"):
        resolve_model("no such name", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="could not be downloaded"):
        resolve_model("some-owner/some-model", None)
