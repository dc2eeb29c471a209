# SPDX-License-Identifier: Apache-2.0
"""Folders of our own kinds as people know them from transformers: save_pretrained, from_pretrained, push_to_hub.

    class Recipe(Pretrained):
        MARK = "steer.json"                            the file that makes a folder one of these
        def write_files(self, folder): ...             fill a folder
        def read_files(cls, folder, **options): ...    read one, a class method
        def leaves(cls, folder): ...                   what an earlier one wrote that a new one may not, a class method

Nothing is downloaded unless `local_files_only=False`. What is read holds safetensors and text: files that run code
when they are opened are refused, and so are links, but those of a hub's own cache into its own store.
"""

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

from anabranch.errors import AnabranchError, UsageError
from anabranch.swap import clean_leftovers, swap_in, sync

RUNS_CODE = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".dill", ".joblib", ".msgpack", ".h5", ".keras"}
    | {".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh"}
)
PORTABLE = ["*.safetensors", "*.json", "*.jsonl", "*.md", "*.txt", "*.yaml", "*.jinja", "*.model"]
"""What is fetched from a hub."""
READ = frozenset(Path(pattern).suffix for pattern in PORTABLE) - {".md"}
"""What a reader may take for a part of what was saved."""
MOST_FILES = 20_000


class Pretrained:
    MARK: ClassVar[str]

    def write_files(self, folder: Path) -> None:
        raise NotImplementedError

    @classmethod
    def read_files(cls, *args: Any, **options: Any) -> Self:
        """From the folder, the first argument."""
        raise NotImplementedError

    @classmethod
    def leaves(cls, folder: Path) -> frozenset[str]:
        """Names of files and folders of an earlier one in `folder` that would be read with a new one's."""
        return frozenset()

    def card(self) -> str:
        """README.md in the form that hubs read."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> Path:
        """Fill a folder that is new, empty, or holds an earlier one of the same kind; `card` is its README.md.

        The earlier one is whole until the new one is; whatever else is in the folder stays, but for weights and
        settings in subfolders that the new one has as well.
        """
        folder = Path(folder).resolve()
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file", expected="a folder, or a free name", hint="another name")
        names = sorted(path.name for path in folder.glob("[!.]*"))  # a clone of an empty repository has hidden ones
        if names and self.MARK not in names:
            raise UsageError(
                f"{folder} holds something else", expected=f"an empty folder, or one with {self.MARK}",
                received=", ".join(names[:3]), hint="another name",
            )  # fmt: skip
        refuse_what_stays(folder)

        def fill(new: Path) -> None:
            self.write_files(new)
            (new / "README.md").write_text(self.card() if card is None else card, encoding="utf-8")
            if folder.is_dir():
                take_along(folder, new, without=self.leaves(folder))
                as_it_was(folder, new)
            for path in [*new.rglob("*"), new]:
                if not path.is_symlink():
                    sync(path)

        return swap_in(fill, folder)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, local_files_only: bool = True, revision: str | None = None,
        cache_dir: str | Path | None = None, **options: Any,
    ) -> Self:  # fmt: skip
        """From a folder, or by its name on a hub: out of the cache, and from the hub itself only where that is said.

        options    what the kind needs to be read, such as `base`

        Raises:
            UsageError: nothing of that name here, a folder that could run code or leads elsewhere, or of another kind.
        """
        folder = found(source, local_files_only=local_files_only, revision=revision, cache_dir=cache_dir)
        refuse_unsafe(folder)
        if not (folder / cls.MARK).is_file():
            raise UsageError(
                f"{source} is no {cls.__name__}", expected=f"a folder with {cls.MARK}", received="a folder without it"
            )
        return cls.read_files(folder, **options)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, card: str | None = None,
        commit_message: str | None = None, api: Any = None,
    ) -> str:  # fmt: skip
        """Make the repository where it is missing, upload what `save_pretrained` writes; the address of the commit.

        api    a huggingface_hub.HfApi with another endpoint or token
        """
        check_repo_id(repo_id)
        api = hub_api() if api is None else api
        with TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "folder", card=card)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
                told = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, revision=revision, repo_type="model",
                    commit_message=commit_message or f"Upload {type(self).__name__}",
                )  # fmt: skip
            except (OSError, RuntimeError, ValueError) as error:
                raise AnabranchError(
                    f"{repo_id} was not pushed", received=f"{type(error).__name__}: {str(error)[:300]}",
                    hint="hf auth login, and a repository that you may write to",
                ) from error  # fmt: skip
        return str(getattr(told, "commit_url", told))


def refuse_what_stays(folder: Path) -> None:
    """
    Raises:
        UsageError: another folder cannot take its place, be it only for a shell that stands in it.
    """
    if folder.is_dir() and not os.access(folder.parent, os.W_OK):
        raise UsageError(
            f"{folder} cannot be replaced", expected="a place where a folder can be put beside it",
            received=f"{folder.parent}, which is not to be written", hint=str(folder / "model"),
        )  # fmt: skip
    here = Path.cwd().is_relative_to(folder)
    if here or folder.is_mount():
        raise UsageError(
            f"{folder} cannot be replaced", expected="a folder that another one may take the place of",
            received="the folder that this process is in" if here else "a disk of its own",
            hint=str(folder / "model"),
        )  # fmt: skip


def take_along(folder: Path, new: Path, without: frozenset[str] = frozenset()) -> None:
    """All that the earlier folder holds besides, without a copy where the disk can do that.

    Of a subfolder that the new one has as well, what a reader could take for the new one's stays behind.
    """
    for entry in folder.iterdir():
        target = new / entry.name
        if entry.name in without:
            continue
        if entry.is_dir() and not entry.is_symlink():
            if target.is_dir():
                read = frozenset(path.name for path in entry.iterdir() if path.suffix in READ)
                take_along(entry, target, without=read)
            else:
                shutil.copytree(entry, target, symlinks=True, copy_function=link_or_copy)
        elif not target.exists():
            link_or_copy(entry, target)


def as_it_was(folder: Path, new: Path) -> None:
    """Whose it is and who may open it; on a system that lets its owner alone say so, as far as that goes."""
    shutil.copystat(folder, new)
    with suppress(OSError):
        os.chown(new, folder.stat().st_uid, folder.stat().st_gid)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def found(
    source: str | Path, *, local_files_only: bool, revision: str | None, cache_dir: str | Path | None = None
) -> Path:
    """The folder on this machine."""
    folder = Path(source).expanduser()
    if not folder.exists() and folder.parent.is_dir():
        with suppress(OSError):  # a save that died between its two renames is ended here
            clean_leftovers(folder.parent)
    if folder.is_dir():
        return folder
    try:
        check_repo_id(str(source))
    except UsageError:
        raise UsageError(f"there is no folder {source}", expected="a folder, or owner/name of a hub") from None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(source), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only,
                allow_patterns=PORTABLE,
            )
        )  # fmt: skip
    except LocalEntryNotFoundError as error:
        if local_files_only:
            raise UsageError(
                f"{source} is neither a folder here nor in the hub's cache", expected="one of them",
                received="nothing was downloaded: that has to be asked for", hint="local_files_only=False",
            ) from None  # fmt: skip
        raise not_downloaded(source, error) from error
    except (HfHubHTTPError, OSError) as error:
        raise not_downloaded(source, error) from error


def not_downloaded(source: str | Path, error: Exception) -> AnabranchError:
    return AnabranchError(
        f"{source} could not be downloaded", received=f"{type(error).__name__}: {str(error)[:300]}",
        hint="does the name exist? is there a network, and HF_HUB_OFFLINE not set? hf auth login for private ones",
    )  # fmt: skip


def refuse_unsafe(folder: Path) -> None:
    """
    Raises:
        UsageError: a file that runs code when it is opened, a link that leads elsewhere, something that is no file.
    """
    folder = folder.resolve()
    store = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    for number, path in enumerate(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if number >= MOST_FILES:
            raise UsageError(f"{folder} holds too much", expected=f"at most {MOST_FILES} files", received="more")
        if path.is_symlink():
            target = path.resolve()
            if store is None or not target.is_relative_to(store) or not target.is_file():
                raise UsageError(f"{folder} holds a link: {name}", expected="files", received=f"a link to {target}")
        elif not path.is_dir() and not stat.S_ISREG(path.lstat().st_mode):
            raise UsageError(f"{folder} holds something that is no file: {name}", expected="files")
        if path.suffix.lower() in RUNS_CODE and not path.is_dir():
            raise UsageError(
                f"{folder} holds {name}, which may run code when it is opened", expected="safetensors and text alone",
                received=path.suffix, hint="take the file away if you trust the rest",
            )  # fmt: skip


def check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"{repo_id!r} is no name of a repository", expected="owner/name", received=str(error)
        ) from None


def hub_api() -> Any:
    """
    Raises:
        UsageError: this process was told to stay offline.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise UsageError("nothing can be pushed offline", received="HF_HUB_OFFLINE is set", hint="unset it")
    return HfApi()
