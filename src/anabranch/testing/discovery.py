# SPDX-License-Identifier: Apache-2.0
"""Where the subject of a method is: beside its tests, found by its key as the tests are.

For the key measure/rank it is `subject()` in tests/measure/test_rank.py or, where a folder keeps those of several
methods together, `subject_rank()` in tests/measure/subjects.py.
"""

import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from anabranch.errors import UsageError
from anabranch.testing.subject import Subject


def find_subject(key: str, tests: Path) -> Subject | None:
    """None where nobody wrote one."""
    folder, name = tests / Path(key).parent, Path(key).name
    for file, function in ((folder / f"test_{name}.py", "subject"), (folder / "subjects.py", f"subject_{name}")):
        if file.exists() and f"def {function}(" in file.read_text(encoding="utf-8"):
            made = getattr(loaded(file), function)()
            if not isinstance(made, Subject):
                raise UsageError(f"{file}: {function}()", expected="a Subject", received=type(made).__name__)
            return made
    return None


@cache
def loaded(file: Path) -> ModuleType:
    name = "anabranch_subjects_" + "_".join(file.with_suffix("").parts[-4:])
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
