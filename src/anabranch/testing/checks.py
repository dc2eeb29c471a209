# SPDX-License-Identifier: Apache-2.0
"""The checks of the contract that every method passes; see `method_contract` for what each of them is."""

import dataclasses
import inspect
import json
import random
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anabranch.errors import AnabranchError
from anabranch.testing.case import Case, NotApplicable, fixed, floating
from anabranch.testing.subject import Inputs, Reordering
from anabranch.testing.trees import Snapshot, children, difference, leaves, replaced, snapshot

OBJECTIVE = "objective"
STRENGTHS = ("*coef", "*strength*", "*scale", "noise", "noise_std", "init_noise", "alpha", "beta", "eta")


# the checks


def config(case: Case) -> None:
    from pydantic import TypeAdapter

    types = [
        value for name, value in vars(case.module).items()
        if name.endswith("Config") and dataclasses.is_dataclass(value) and value.__module__ == case.module.__name__
    ]  # fmt: skip
    if not types:
        raise NotApplicable("it has no Config")
    given = {type(value): value for value in (*case.subject.configs, *case.make().values())}
    for kind in types:
        try:
            value = given.get(kind) or kind()
        except TypeError:
            raise AssertionError(f"{kind.__name__} needs values: give the subject an instance, configs=(...)") from None
        written = json.dumps(dataclasses.asdict(value))
        again = TypeAdapter(kind).validate_json(written)
        assert again == value, f"{kind.__name__} is another one after JSON: {again} and not {value}"
        assert json.dumps(dataclasses.asdict(again)) == written, f"{kind.__name__} is written differently once read"
        try:
            kind(**{field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, no_such_name=1)
        except (TypeError, AnabranchError, ValueError):
            continue
        raise AssertionError(f"{kind.__name__} takes a name that it does not know")


def dtype(case: Case) -> None:
    if not any(is_single(leaf) for _, leaf in floating(case.make())):
        raise NotApplicable("nothing that it takes is in float32")
    assert case.subject.half, "the subject names no precision"
    for precision, tolerance in case.subject.half.items():
        given, rounded = case.make(), case.make()
        autocast = any(is_own(name, value, case.module) for name, value in given.items())
        if not autocast:  # what learns keeps its parameters in float32, as in training
            given, rounded = (
                in_precision(given, precision),
                in_precision(in_precision(rounded, precision), torch.float32),
            )
        reference = case.run(rounded)
        try:
            with torch.autocast("cpu", precision, enabled=autocast):
                received = case.run(given)
        except (AnabranchError, ValueError):
            continue
        except (RuntimeError, TypeError) as error:
            raise AssertionError(f"{precision}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
        differs = case.differs(received, reference, tolerance)
        assert differs is None, f"{precision}: {differs}"


def is_single(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) in (torch.float32, np.dtype(np.float32))


def in_precision(value: Any, precision: torch.dtype) -> Any:
    """Modules, tensors and arrays of floating numbers; fp64 stays, and arrays have no bf16, so take fp16."""
    if isinstance(value, nn.Module):
        return value.to(precision)
    if isinstance(value, Tensor):
        return value.to(precision) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, np.ndarray):
        names = {torch.float32: np.float32, torch.float64: np.float64}
        return value.astype(names.get(precision, np.float16)) if value.dtype in (np.float32, np.float16) else value
    parts = children(value)
    if not parts:
        return value
    for name, part in parts.items():
        changed = in_precision(part, precision)
        if changed is not part and not hasattr(value, "components"):
            value = replaced(value, name, lambda _, changed=changed: changed)
    return value


def padding(case: Case) -> None:
    subject = case.subject
    if subject.pad is None:
        taken = {name: value for name, value in case.make().items() if not isinstance(value, nn.Module)}
        masks = [path for path, _ in leaves(taken) if path.endswith("mask")]
        if not masks:
            raise NotApplicable("nothing that it takes is masked")
        raise AssertionError(f"it takes {masks[0]}: give the subject `pad`, which adds masked rows")
    padded = {"": subject.unpad(case.run(subject.pad(case.make()))[""])}
    differs = case.differs(padded, {"": case.fresh()[""]})
    assert differs is None, f"padding changes the output: {differs}"


def samples(case: Case) -> None:
    if case.subject.samples is None:
        several = [name for name, value in case.make().items() if is_several(value)]
        if not several:
            raise NotApplicable("it takes one of everything")
        raise AssertionError(f"it takes several {several[0]}: give the subject `samples`, another order of them")
    follows(case, case.subject.samples, "sample")


def is_several(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0 and len(value) > 1
    if isinstance(value, nn.Module) or hasattr(value, "components"):
        return False
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return len(value) > 1
    return any(map(is_several, (children(value) or {}).values()))


def experts(case: Case) -> None:
    if case.subject.experts is None:
        held = [name for name, value in case.make().items() if "expert" in name or has_experts(value)]
        if not held:
            raise NotApplicable("it takes nothing that has experts")
        raise AssertionError(f"{held[0]} has experts: give the subject `experts`, another order of them")
    follows(case, case.subject.experts, "expert")


def has_experts(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return any("experts" in module._modules or hasattr(module, "num_experts") for module in value.modules())
    parts = (children(value) or {}).values()
    tensors = any(isinstance(leaf, Tensor) for _, leaf in leaves(value))  # a Config has none: it asks for experts
    return (hasattr(value, "num_experts") and tensors) or any(map(has_experts, parts))


def follows(case: Case, reordering: Reordering, what: str) -> None:
    order = torch.randperm(reordering.size, generator=torch.Generator().manual_seed(case.seed + 1)).tolist()
    plain, moved = reordering.compared(case.fresh()[""]), case.run(reordering.inputs(case.make(), order))[""]
    differs = case.differs(reordering.compared(moved), reordering.output(plain, order))
    assert differs is None, f"{what}s in another order give another output: {differs}"


def determinism(case: Case) -> None:
    differs = difference(case.make(), case.make())
    assert differs is None, f"the subject's inputs are not the same twice: {differs}"
    differs = difference(case.fresh(), snapshot(case.fresh()))
    assert differs is None, f"the same inputs and generator state give another result: {differs}"


def rng(case: Case) -> None:
    given = case.make()
    before = torch.get_rng_state(), of_numpy(), random.getstate()
    first = snapshot(case.run(given))
    moved = [
        name for name, same in (
            ("torch", torch.equal(before[0], torch.get_rng_state())),
            ("numpy", before[1] == of_numpy()),
            ("python", before[2] == random.getstate()),
        ) if not same
    ]  # fmt: skip
    assert not moved, f"the global generator of {' and '.join(moved)} is used"
    torch.manual_seed(case.seed + 12345)
    np.random.seed(12345)
    random.seed(12345)
    differs = difference(case.fresh(), first)
    assert differs is None, f"the result depends on a global generator: {differs}"


def of_numpy() -> tuple[Any, ...]:
    """The state of numpy's global generator: its keys, and the place among them, which is all that most draws move."""
    _, keys, *place = np.random.get_state()
    return keys.tolist(), *place


def inputs(case: Case) -> None:
    given = case.make()
    before = fixed(given, case.subject.changes)
    case.run(given)
    differs = difference(fixed(given, case.subject.changes), before)
    assert differs is None, f"it changes what it was given: {differs}"


def save(case: Case) -> None:
    if case.subject.reload is not None:
        output = case.fresh()[""]
        with TemporaryDirectory() as folder:
            differs = difference(case.subject.reload(output, Path(folder)), output)
        assert differs is None, f"saved and loaded it is another one: {differs}"
        return
    given, twin = case.make(), case.make(1)
    owned = [name for name, value in given.items() if is_own(name, value, case.module)]
    if not owned:
        if not has_state(case.module):
            raise NotApplicable("it has no state of its own")
        raise AssertionError("it has state: give its module among the inputs, or `reload`")
    plain = snapshot(case.fresh())
    for name in owned:
        twin[name].load_state_dict(through_a_file(given[name]), strict=True)
        differs = difference(twin[name].state_dict(), given[name].state_dict())
        assert differs is None, f"the state of {name} is another one after saving: {differs}"
        output = case.run({**case.make(), name: twin[name]})
        differs = difference(output, plain)
        assert differs is None, f"{name} holds something that its state_dict does not: {differs}"


def is_own(name: str, value: Any, module: ModuleType) -> bool:
    """What the method itself learns in: a module of its own, or one that is called objective."""
    return isinstance(value, nn.Module) and (type(value).__module__ == module.__name__ or name == OBJECTIVE)


def has_state(module: ModuleType) -> bool:
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    classes = [value for value in own if inspect.isclass(value)]
    functions = {value.__name__ for value in own if inspect.isfunction(value)}
    saves = functions >= {"save", "load"} or any(hasattr(value, "save") and hasattr(value, "load") for value in classes)
    return saves or any(issubclass(value, nn.Module) for value in classes)


def through_a_file(module: nn.Module) -> dict[str, Tensor]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file({name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}, file)
        return load_file(file)


def touch(case: Case) -> None:
    given = case.make()
    own = [value for name, value in given.items() if is_own(name, value, case.module)]
    if not own and not case.subject.changes:
        raise NotApplicable("it changes no tensors")
    assert case.subject.touches is not None, "it changes tensors: give the subject `touches`, their names"
    before = tensors_of(given, case)
    output = case.run(given)[""]
    step(output, own)
    after = tensors_of(given, case)
    names = before.keys() | after.keys()
    changed = {path for path in names if difference(of(after, path), of(before, path)) is not None}
    named = case.subject.touches(given, output)
    told = {path for path in names if any(fnmatchcase(path, pattern) for pattern in named)}
    assert changed, "it changes nothing"
    assert not changed - told, f"it changes {sorted(changed - told)[0]}, which it does not name"
    assert not told - changed, f"it names {sorted(told - changed)[0]}, which stays as it was"


def tensors_of(given: Inputs, case: Case) -> Snapshot:
    """Every tensor of every model among the inputs, under its first name where two hold it."""
    held = {
        name: value for name, value in given.items()
        if name in case.subject.changes or isinstance(value, nn.Module) or hasattr(value, "components")
    }  # fmt: skip
    first: dict[int, str] = {}
    for path, leaf in leaves(held):
        if isinstance(leaf, Tensor) and leaf.numel():
            first.setdefault(id(leaf), path)
    names = set(first.values())
    return Snapshot({path: leaf for path, leaf in snapshot(held).items() if path in names})


def of(values: Mapping[str, Any], path: str) -> Snapshot:
    return Snapshot({path: values[path]} if path in values else {})


def step(output: Any, modules: list[nn.Module]) -> None:
    """Of an objective; a method without a loss has changed its tensors itself."""
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if loss is None or not loss.requires_grad:
        return
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    loss.backward()
    optimizer.step()


def off(case: Case) -> None:
    if case.subject.off is None:
        what = strength(case)
        if what is None:
            raise NotApplicable("it has no strength")
        raise AssertionError(f"{what}: give the subject `off`, strength 0 and the plain thing")
    received, expected = case.subject.off(case.make())
    differs = difference(received, expected)
    assert differs is None, f"strength 0 is not the plain thing: {differs}"


def strength(case: Case) -> str | None:
    """Why an off-switch is to be expected; None where it is not."""
    if case.subject.changes:
        return f"it changes {case.subject.changes[0]}"
    if any(is_own(name, value, case.module) for name, value in case.make().items()):
        return "it learns"
    own = [value for value in vars(case.module).values() if getattr(value, "__module__", None) == case.module.__name__]
    for value in own:
        names = []
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
        elif inspect.isfunction(value):
            parameters = inspect.signature(value).parameters.values()
            names = [one.name for one in parameters if one.annotation in (float, "float")]
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in STRENGTHS):
                return f"{value.__name__} takes {name}"
    return None
