"""Do the arrows between the modules point the way ARCHITECTURE.md says, and is there nowhere a pickle?

Imports are read with `ast` from the source, those inside functions and under TYPE_CHECKING included.
Each rule is a function from modules to violations, and is itself tried on sources that break it.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("coordinator", "peer", "scripts", "tests")
PRODUCT = ("coordinator", "peer")

COMMANDS = {
    *("coordinator.cli", "coordinator.start", "coordinator.invite", "coordinator.monitor"),
    *("peer.cli", "peer.join", "peer.doctor", "peer.ledger"),
}
MAY_IMPORT_HIVEMIND = {f"coordinator.{name}" for name in ("network", "board", "guard", "door", "streams")}
NETWORK_MODULES = {*MAY_IMPORT_HIVEMIND, "peer.allreduce", "peer.audit"}
TRAINING_MODULES = {
    *("peer.data", "peer.tables", "peer.tasks", "peer.model", "peer.finetune", "peer.evaluate"),
    *("peer.benchmark", "peer.statistics"),
}
FUSION_MODULES = {
    *("peer.aggregate", "peer.compression", "peer.feedback", "peer.fusion", "peer.manifest"),
    *("peer.outer", "peer.parts", "peer.reduction"),
}
TENSOR_MODULES = {"peer.layout", "peer.state", "peer.allreduce", "peer.audit", *FUSION_MODULES}  # not models
PICKLES = {
    "pickle",
    "_pickle",
    "cPickle",
    "pickletools",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
}
UNPICKLING_CALLS = {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "pandas.read_pickle"}


@dataclass(frozen=True)
class Module:
    name: str  # dotted: "peer.state"; a package is its own name
    tree: ast.Module
    imports: frozenset[str]  # dotted names; `from a import b` counts as "a" and "a.b"

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


Modules = Mapping[str, Module]
Rule = Callable[[Modules], Iterator[str]]


def parse(name: str, source: str) -> Module:
    tree = ast.parse(source)
    return Module(name, tree, frozenset(imported_names(tree, name)))


def imported_names(tree: ast.Module, module_name: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = ".".join(module_name.split(".")[: -node.level])
                base = f"{parent}.{base}".strip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and dotted(node.func) in ("importlib.import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def dotted(node: ast.AST) -> str:
    """ "a.b.c" of such an expression; "" of any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value = dotted(node.value)
        return f"{value}.{node.attr}" if value else ""
    return ""


@functools.cache
def read_modules() -> dict[str, Module]:
    modules = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
            modules[name] = parse(name, path.read_text(encoding="utf-8"))
    return modules


def imports_any(module: Module, *roots: str) -> list[str]:
    return sorted(n for n in module.imports if any(n == root or n.startswith(f"{root}.") for root in roots))


def members(modules: Modules, *packages: str) -> Iterator[Module]:
    return (module for module in modules.values() if module.package in packages)


# --- the rules


def arrows_point_down(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        if module.package == "coordinator":
            forbidden = ("scripts", "tests") if module.name in COMMANDS else ("peer", "scripts", "tests")
        elif module.package == "peer":
            forbidden = ("scripts", "tests")
        else:
            continue
        for name in imports_any(module, *forbidden):
            yield f"{module.name} imports {name}"


def coordinator_has_no_torch(modules: Modules) -> Iterator[str]:
    for module in members(modules, "coordinator"):
        if module.name not in COMMANDS:
            for name in imports_any(module, "torch", "transformers"):
                yield f"{module.name} imports {name}"


def hivemind_is_wrapped(modules: Modules) -> Iterator[str]:
    for module in members(modules, *PRODUCT):
        if module.name not in MAY_IMPORT_HIVEMIND:
            for name in imports_any(module, "hivemind"):
                yield f"{module.name} imports {name}"


def averaging_is_our_own(modules: Modules) -> Iterator[str]:
    for module in members(modules, *PRODUCT):
        names = ("averaging", "AllReduceRunner", "DecentralizedAverager", "TensorPartContainer")
        for name in imports_any(module, *(f"hivemind.{name}" for name in names)):
            yield f"{module.name} imports {name}"


def only_commands_parse_flags(modules: Modules) -> Iterator[str]:
    for module in members(modules, *PRODUCT):
        if module.name not in COMMANDS:
            for name in imports_any(module, "argparse", "optparse", "getopt", "click", "typer"):
                yield f"{module.name} imports {name}"


def libraries_do_not_import_commands(modules: Modules) -> Iterator[str]:
    for module in members(modules, *PRODUCT):
        if module.name not in COMMANDS:
            for name in sorted(COMMANDS & module.imports):
                yield f"{module.name} imports {name}"


def training_knows_no_network(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        if module.name in TRAINING_MODULES | FUSION_MODULES:
            for name in imports_any(module, *NETWORK_MODULES):
                yield f"{module.name} imports {name}"


def tensors_know_no_models(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        if module.name in TENSOR_MODULES:
            for name in imports_any(module, "transformers", *TRAINING_MODULES):
                yield f"{module.name} imports {name}"


def nothing_is_unpickled_or_run(modules: Modules) -> Iterator[str]:
    for module in members(modules, *PRODUCT):
        for name in imports_any(module, *PICKLES):
            yield f"{module.name} imports {name}"
        for name in sorted(UNPICKLING_CALLS & module.imports):
            yield f"{module.name} imports {name}"
        for node in ast.walk(module.tree):
            for what in dangers(node):
                yield f"{module.name}:{getattr(node, 'lineno', '?')} {what}"


def dangers(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and dotted(node) in UNPICKLING_CALLS:
        yield f"uses {dotted(node)}"
    if isinstance(node, ast.Call) and dotted(node.func) in ("eval", "exec", "builtins.eval", "builtins.exec"):
        yield f"calls {dotted(node.func)}"
    if isinstance(node, ast.keyword):
        is_off = isinstance(node.value, ast.Constant) and node.value.value is False
        if node.arg in ("trust_remote_code", "allow_pickle") and not is_off:
            yield f"sets {node.arg}"
        if node.arg == "use_safetensors" and is_off:
            yield "loads a model that is not safetensors"
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            is_off = isinstance(value, ast.Constant) and value.value is False
            if (
                isinstance(key, ast.Constant)
                and key.value in ("trust_remote_code", "allow_pickle")
                and not is_off
            ):
                yield f"sets {key.value}"


def every_module_says_its_question(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        docstring = ast.get_docstring(module.tree) or ""
        if not docstring.strip():
            yield f"{module.name} has no docstring"


def no_import_cycles(modules: Modules) -> Iterator[str]:
    """Of the import statements of all kinds; `from package import module` counts as that module."""
    arrows = {name: sorted((module.imports & modules.keys()) - {name}) for name, module in modules.items()}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> Iterator[str]:
        if name in path:
            yield " -> ".join((*path[path.index(name) :], name))
        elif name not in finished:
            for target in arrows[name]:
                yield from visit(target, (*path, name))
            finished.add(name)

    for name in arrows:
        yield from visit(name, ())


RULES: tuple[Rule, ...] = (
    arrows_point_down,
    coordinator_has_no_torch,
    hivemind_is_wrapped,
    averaging_is_our_own,
    only_commands_parse_flags,
    libraries_do_not_import_commands,
    training_knows_no_network,
    tensors_know_no_models,
    nothing_is_unpickled_or_run,
    every_module_says_its_question,
    no_import_cycles,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule: Rule) -> None:
    modules = read_modules()
    assert {"coordinator.errors", "peer.layout", "peer.state", "tests.test_architecture"} <= modules.keys()
    assert list(rule(modules)) == []


# --- the rules see what they should

BREAKS: list[tuple[Rule, dict[str, str]]] = [
    (arrows_point_down, {"coordinator.rounds": "import peer.state"}),
    (arrows_point_down, {"coordinator.rounds": "from peer import state"}),
    (arrows_point_down, {"coordinator.rounds": "def f():\n    from peer.state import Checkpoint"}),
    (arrows_point_down, {"coordinator.rounds": "import importlib\nimportlib.import_module('peer.state')"}),
    (arrows_point_down, {"coordinator.start": "import scripts.demo"}),
    (arrows_point_down, {"peer.session": "import tests.fakes"}),
    (coordinator_has_no_torch, {"coordinator.spec": "import torch.nn"}),
    (coordinator_has_no_torch, {"coordinator.spec": "if TYPE_CHECKING:\n    from torch import Tensor"}),
    (hivemind_is_wrapped, {"peer.session": "from hivemind.p2p import P2P"}),
    (averaging_is_our_own, {"coordinator.network": "import hivemind.averaging.allreduce"}),
    (averaging_is_our_own, {"coordinator.board": "from hivemind import averaging"}),
    (averaging_is_our_own, {"coordinator.board": "from hivemind import DecentralizedAverager"}),
    (only_commands_parse_flags, {"peer.config": "from argparse import ArgumentParser"}),
    (libraries_do_not_import_commands, {"peer.session": "from peer.join import main"}),
    (libraries_do_not_import_commands, {"peer.session": "from peer import join"}),
    (training_knows_no_network, {"peer.finetune": "from coordinator import network"}),
    (training_knows_no_network, {"peer.reduction": "import peer.allreduce"}),
    (tensors_know_no_models, {"peer.state": "from peer.model import export_model"}),
    (tensors_know_no_models, {"peer.allreduce": "import transformers"}),
    (nothing_is_unpickled_or_run, {"peer.x": "import pickle"}),
    (nothing_is_unpickled_or_run, {"peer.x": "import torch\ntorch.load('x', weights_only=True)"}),
    (nothing_is_unpickled_or_run, {"peer.x": "from torch import load"}),
    (nothing_is_unpickled_or_run, {"peer.x": "import torch\nread = torch.load"}),
    (nothing_is_unpickled_or_run, {"peer.x": "f(trust_remote_code=True)"}),
    (nothing_is_unpickled_or_run, {"peer.x": "f(trust_remote_code=flag)"}),
    (nothing_is_unpickled_or_run, {"peer.x": "f(**{'trust_remote_code': flag})"}),
    (nothing_is_unpickled_or_run, {"peer.x": "f(use_safetensors=False)"}),
    (nothing_is_unpickled_or_run, {"peer.x": "numpy.load('x', allow_pickle=True)"}),
    (nothing_is_unpickled_or_run, {"coordinator.x": "eval(text)"}),
    (every_module_says_its_question, {"scripts.demo": "x = 1"}),
    (every_module_says_its_question, {"scripts.demo": "''"}),
    (no_import_cycles, {"peer.a": "import peer.b", "peer.b": "from peer import a"}),
    (
        no_import_cycles,
        {"peer.a": "from . import b", "peer.b": "from .c import x", "peer.c": "import peer.a"},
    ),
]

KEEPS: list[tuple[Rule, dict[str, str]]] = [
    (arrows_point_down, {"coordinator.start": "from peer.model import load_backbone"}),
    (arrows_point_down, {"peer.session": "import coordinator.rounds", "tests.test_x": "import peer.session"}),
    (hivemind_is_wrapped, {"coordinator.network": "import hivemind", "tests.test_x": "import hivemind"}),
    (averaging_is_our_own, {"scripts.bench_fusion": "import hivemind.averaging"}),
    (only_commands_parse_flags, {"peer.join": "import argparse", "scripts.demo": "import argparse"}),
    (
        nothing_is_unpickled_or_run,
        {"peer.x": "model.eval()\nf(trust_remote_code=False, use_safetensors=True)"},
    ),
    (no_import_cycles, {"peer.a": "import peer.b\nimport peer.c", "peer.b": "import peer.c", "peer.c": ""}),
]


def names_of(case: object) -> str:
    return getattr(case, "__name__", "")


@pytest.mark.parametrize(("rule", "sources"), BREAKS, ids=names_of)
def test_a_break_is_seen(rule: Rule, sources: dict[str, str]) -> None:
    assert list(rule({name: parse(name, source) for name, source in sources.items()}))


@pytest.mark.parametrize(("rule", "sources"), KEEPS, ids=names_of)
def test_what_is_allowed_passes(rule: Rule, sources: dict[str, str]) -> None:
    assert not list(rule({name: parse(name, source) for name, source in sources.items()}))
