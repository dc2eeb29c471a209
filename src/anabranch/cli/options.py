# SPDX-License-Identifier: Apache-2.0
"""From flags, `--set name=value` and a YAML file to one checked settings record.

A command shows a few fields of its settings as flags; every other field is set by name.
Later wins: the file, `--set`, the flag.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

import tyro

from anabranch.cli.choices import refuse
from anabranch.cli.flags import OFFERS, fields_by_flag, parse, written
from anabranch.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
MAX_BYTES = 1_000_000


def settings_of(flags: type) -> Any:
    """The record that a command makes of its flags, as its FileAndSet[...] names it."""
    return get_args(flags.__orig_bases__[0])[0]  # type: ignore[attr-defined]


def assignments(flags: type) -> list[str]:
    return [f"{field.name}=" for field in dataclasses.fields(settings_of(flags))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileAndSet(Generic[Settings]):
    """The two ways to every setting that has no flag."""

    config: Path | None = None
    """A YAML file of settings, such as the config.resolved.yaml of another run."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = dataclasses.field(default=(), metadata={OFFERS: assignments})
    """name=value for any further setting."""


def read(flags: type[FileAndSet[Settings]], argv: list[str], command: str) -> Settings:
    """What one command is told, as the record that its job takes."""
    settings: type[Settings] = settings_of(flags)
    return settle(settings, parse(flags, argv, command), argv)


def settle(settings: type[Settings], flags: FileAndSet[Any], argv: list[str]) -> Settings:
    """The file, then `--set`, then the flags that were written out, as one checked record."""
    given: dict[str, Any] = read_yaml(flags.config) if flags.config else {}
    for assignment in flags.set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment} sets nothing", expected="--set name=value")
        given[name] = _load(value, f"--set {name}")
    fields = fields_by_flag(type(flags))
    names = {fields[name].name for name, _ in written(argv)} - {"config", "set"}
    return validate(settings, given | {name: getattr(flags, name) for name in names})


def validate(settings: type[Settings], given: dict[str, Any]) -> Settings:
    """The record, every value of its field's type, no unknown field."""
    known = {field.name: field.type for field in dataclasses.fields(settings)}
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"there is no setting {name!r}", hint=did_you_mean(str(name), known))
        refuse(name, known[name], value)
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(settings).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "the settings"
        raise UsageError(f"{name} cannot be used", expected=first["msg"], received=repr(first.get("input"))) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file: at most 1 MB, no aliases, no duplicate keys, plain values only."""
    if not path.is_file():
        raise UsageError(f"{path} cannot be read", expected="a YAML file of settings", received="no such file")
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path} is too large", expected="at most 1 MB", received=f"{path.stat().st_size} bytes")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text", expected="UTF-8", received=error.reason) from None
    loaded = _load(text, str(path))
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} holds no settings", expected="name: value lines", received=type(loaded).__name__)
    return loaded


def _load(text: str, where: str) -> Any:
    import yaml

    class Strict(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise UsageError(f"{where} uses a YAML alias", expected="plain values", hint="write the value out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key) for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                raise UsageError(f"{where} sets {twice[0]!r} twice", expected="every setting once")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader=Strict)  # a SafeLoader: plain values only
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date or number that is none
        raise UsageError(f"{where} is not YAML", received=str(error).splitlines()[0]) from None
