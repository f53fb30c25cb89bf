"""A dataset folder to the Hugging Face Hub, and back: the files of one generation, dataset.json last. No torch.

Who reads the repository at any moment finds a whole dataset in it, or none: shards come first, in commits of their own,
and one commit at the end brings all that names them and takes away what the last generation alone had.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from fastlatent.config.hub import PullConfig, PushConfig
from fastlatent.pipeline.interrupt import StopRequest
from fastlatent.pipeline.progress import Progress
from fastlatent.store.build import LOCK, PLAN, Lock
from fastlatent.store.files import (
    fsync_directory,
    hexadecimal,
    inside,
    make_directory,
    member,
    natural,
    parse_json,
    read_bytes,
    write_atomic,
)
from fastlatent.store.generation import keep_copy
from fastlatent.store.provenance import fingerprint as fingerprint_of
from fastlatent.store.reader import GENERATION, PROVENANCE, Dataset, read_provenance, read_root
from fastlatent.store.records import ROOT, FileRecord, ShardRecord
from fastlatent.store.verify import hash_file
from fastlatent.store.verify import verify as check
from fastlatent.workflows.verify import print_findings

KIND = "dataset"  # of repository
FOLDERS = ("manifest", "index", "statistics", "quarantine", "shards")
SETTINGS = ("encode.yaml", "convert.yaml")
BESIDE = (".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")  # a person's
STAGE = ".pull"  # below OUT; holds what is not checked yet
COMMIT_FILES, COMMIT_BYTES = 64, 16 << 30  # of shards in a commit: what an interruption costs at most
MAX_ROOT_BYTES = 1 << 28
THREADS = 4  # downloads at a time


def push(config: PushConfig) -> None:
    """See PushConfig.

    Raises:
        ValueError: the dataset is damaged, the repository holds something else, or the hub refuses.
    """
    api = _api()
    path = Path(config.dataset)
    report = check(path, full=False, threads=os.cpu_count() or 1)
    if report.findings:
        print_findings(report.findings)
        raise ValueError(f"{path}: expected a sound dataset, got the above; `fastlatent repair {path}` takes it out")
    dataset = Dataset.open(path)
    root = read_bytes(path / ROOT)
    if parse_json(root, ROOT) != dataset.root:
        raise ValueError(f"{path}: a new generation was published just now; run the same command again")
    private = True if config.private else None  # None: as the owner's settings have it
    with _hub(f"{config.repo_id}: cannot be made or seen", "log in with `hf auth login`, or check the name"):
        api.create_repo(config.repo_id, repo_type=KIND, private=private, exist_ok=True)
        if config.revision:
            api.create_branch(config.repo_id, branch=config.revision, repo_type=KIND, exist_ok=True)
    there = _look(api, config.repo_id, config.revision)
    if config.private and not there.private:
        raise ValueError(f"{config.repo_id}: expected a private repository, it is public; change that on the hub first")
    _check_repo(api, there, dataset)
    _Push(api, config, there, dataset, root).run()


def pull(config: PullConfig) -> int:
    """See PullConfig; 1 where --full finds something wrong.

    Raises:
        ValueError: the repository holds no such dataset, what came is damaged, OUT holds something else, or the hub
            refuses. dataset.json is written last: without it OUT is no dataset.
    """
    api, out = _api(), Path(config.out)
    there = _look(api, config.repo_id, config.revision)
    if ROOT not in there.sizes:
        first = ", ".join(sorted(there.sizes)[:3]) or "nothing"
        raise ValueError(
            f"{config.repo_id}: expected a dataset with {ROOT}, got {first}; if a push was interrupted, run it again"
        )
    _check_folder(out)
    make_directory(out)
    lock = Lock(out)
    try:
        root = _Pull(api, there, out).run()
    finally:
        lock.release()
    print(f"{out}: generation {root['generation']}, {root['totals']['rows']:,} rows, every file checked")
    if not config.full:
        return 0
    report = check(out, full=True, threads=os.cpu_count() or 1)
    print_findings(report.findings)
    return 1 if report.findings else 0


@dataclass(frozen=True)
class _Repo:
    """A repository at one commit: path -> size of its files."""

    id: str
    commit: str
    private: bool
    sizes: dict[str, int]


@dataclass
class _Push:
    api: Any
    config: PushConfig
    there: _Repo
    dataset: Dataset
    root: bytes

    def run(self) -> None:
        dataset, there, path = self.dataset, self.there, self.dataset.path
        named = [record.path for record in _records(dataset.root)]
        settings = [name for name in SETTINGS if (path / name).is_file()]
        wanted = {ROOT, PROVENANCE, *named, *settings, *(shard.path for shard in dataset.shards)}
        old = [name for name in there.sizes if name not in wanted and (_is_ours(name) or name in SETTINGS)]
        # A shard's name has its digest.
        shards = [shard for shard in dataset.shards if there.sizes.get(shard.path) != shard.bytes]
        commit = there.commit
        if PROVENANCE not in there.sizes:  # from here on the repository is this dataset's
            commit = self._commit(commit, "Provenance", {PROVENANCE: path / PROVENANCE})
        size = sum(shard.bytes for shard in shards)
        with StopRequest() as stop, Progress("push", len(dataset.shards), "shards") as progress:
            progress.advance(len(dataset.shards) - len(shards))
            for batch in _batches(shards):
                for shard in batch:
                    if hash_file(inside(path, shard.path, "manifest")) != shard.xxh3_128:
                        raise ValueError(
                            f"{path / shard.path}: expected xxh3_128 {shard.xxh3_128}: the shard is damaged, and was "
                            f"not uploaded; `fastlatent repair {path}` takes it out"
                        )
                    stop.check()
                commit = self._commit(commit, "Shards", {shard.path: path / shard.path for shard in batch})
                progress.advance(len(batch))
                stop.check()
        last = {name: path / name for name in (PROVENANCE, *named, *settings)} | {ROOT: self.root}
        commit = self._commit(commit, f"Generation {dataset.generation}", last, old)
        print(
            f"{there.id}: generation {dataset.generation}, {len(dataset):,} rows at commit {commit}; {len(shards)} of "
            f"{len(dataset.shards)} shards uploaded now, {size / 2**20:,.1f} MiB"
        )

    def _commit(
        self, parent: str, message: str, files: Mapping[str, Path | bytes], old: list[str] | None = None
    ) -> str:
        """The commit that adds these files, onto `parent` and nothing else: of two pushes at once one is refused."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=data if isinstance(data, bytes) else str(data))
            for name, data in files.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in old or ()]
        with _hub(f"{self.there.id}: the upload failed", "run the same command again, it goes on from here"):
            done = self.api.create_commit(
                self.there.id,
                operations,
                commit_message=message,
                repo_type=KIND,
                revision=self.config.revision,
                parent_commit=parent,
            )
        return str(done.oid)


@dataclass
class _Pull:
    api: Any
    there: _Repo
    out: Path

    def run(self) -> dict[str, Any]:
        """Bring OUT to the repository's generation; its dataset.json."""
        out, stage = self.out, self.out / STAGE
        for name in (ROOT, PROVENANCE):  # anew each time: one that came damaged would be taken for whole
            self._fetch(name, stage, again=True)
        root = _root(stage)
        data, told = read_bytes(stage / ROOT), read_provenance(stage)
        if fingerprint_of(told["hashed"]) != root["fingerprint"]:
            raise ValueError(f"{self.there.id}: {PROVENANCE} is not what {ROOT} names: the repository is damaged")
        _check_out(out, root)
        if not (out / PROVENANCE).exists():
            write_atomic(out / PROVENANCE, read_bytes(stage / PROVENANCE))
        records = _records(root)
        for record in records:
            self._bring(record)
        shards = self._shards(root)
        with (
            StopRequest() as stop,
            Progress("pull", len(shards), "shards") as progress,
            ThreadPoolExecutor(THREADS, thread_name_prefix="pull") as pool,
        ):
            pending = [pool.submit(self._bring, shard) for shard in shards]
            try:
                for one in pending:
                    one.result()
                    progress.advance()
                    stop.check()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        Dataset(out, root)  # index and manifests against each other
        for name in SETTINGS:
            if name in self.there.sizes:
                self._fetch(name, stage)
                os.replace(stage / name, out / name)
        write_atomic(out / ROOT, data)
        keep_copy(out)
        shutil.rmtree(stage)
        return root

    def _shards(self, root: Mapping[str, Any]) -> list[ShardRecord]:
        shards = []
        for entry in root["manifests"]:
            record = FileRecord.parse(entry, f"{ROOT}: manifests")
            listed = member(record.read_json(self.out), "shards", list, record.path)
            shards += [ShardRecord.parse(one, f"{record.path}: shards") for one in listed]
        return shards

    def _bring(self, record: FileRecord | ShardRecord) -> None:
        """Have one file in its place, checked.

        Raises:
            ValueError: its name leads elsewhere, or it came damaged twice.
        """
        if not _is_ours(record.path):
            raise ValueError(
                f"{self.there.id}: expected files in {', '.join(FOLDERS)}, got {record.path!r:.200}: it was not taken"
            )
        place, staged = (inside(root, record.path, self.there.id) for root in (self.out, self.out / STAGE))
        if _is_whole(place, record):
            return
        if self.there.sizes.get(record.path) != record.bytes:
            size = self.there.sizes.get(record.path)
            raise ValueError(f"{self.there.id}: expected {record.path} of {record.bytes} bytes, got {size}: damaged")
        for again in (False, True):
            self._fetch(record.path, self.out / STAGE, again=again)
            if _is_whole(staged, record):
                break
            staged.unlink()
        else:
            raise ValueError(
                f"{self.there.id}: {record.path}: expected xxh3_128 {record.xxh3_128}, what came has another: "
                "damaged on the hub or on the way; run the same command again, or push the dataset again"
            )
        make_directory(place.parent)
        with open(staged, "rb") as file:
            os.fdatasync(file.fileno())
        os.replace(staged, place)
        fsync_directory(place.parent)

    def _fetch(self, name: str, to: Path, *, again: bool = False) -> None:
        with _hub(f"{self.there.id}: {name} could not be downloaded", "run the same command again, it goes on"):
            self.api.hf_hub_download(
                self.there.id, name, repo_type=KIND, revision=self.there.commit, local_dir=to, force_download=again
            )


def _api() -> Any:
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise ValueError("push and pull need huggingface_hub: pip install huggingface_hub") from None
    disable_progress_bars()  # four at a time write over each other, and over ours
    return HfApi()


@contextmanager
def _hub(what: str, remedy: str) -> Iterator[None]:
    """What goes wrong inside, as a ValueError: of httpx, requests, the hub and the network."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:500] or type(error).__name__
        raise ValueError(f"{what}: {said}; {remedy}") from error


def _look(api: Any, repo_id: str, revision: str | None) -> _Repo:
    """The repository's present commit, by which all else is read."""
    with _hub(f"{repo_id}: cannot be read", "check the name and --revision, or log in with `hf auth login`"):
        info = api.repo_info(repo_id, repo_type=KIND, revision=revision)
        tree = list(api.list_repo_tree(repo_id, recursive=True, revision=info.sha, repo_type=KIND))
    sizes = {one.path: one.size for one in tree if hasattr(one, "size")}
    return _Repo(repo_id, str(info.sha), bool(getattr(info, "private", False)), sizes)


def _check_repo(api: Any, there: _Repo, dataset: Dataset) -> None:
    """Raise ValueError unless the repository is empty, or holds this dataset or a part of it."""
    foreign = [name for name in there.sizes if name not in BESIDE]
    if not foreign:
        return
    if PROVENANCE not in there.sizes:
        raise ValueError(
            f"{there.id}: expected an empty repository or one of this dataset, it holds {', '.join(foreign[:3])}: use "
            "another name"
        )
    known = [name for name in (ROOT, PROVENANCE) if name in there.sizes]
    if any(there.sizes[name] > MAX_ROOT_BYTES for name in known):
        raise ValueError(f"{there.id}: expected {' and '.join(known)} of at most {MAX_ROOT_BYTES} bytes")
    with TemporaryDirectory() as folder, _hub(f"{there.id}: cannot be read", "run the same command again"):
        for name in known:
            api.hf_hub_download(there.id, name, repo_type=KIND, revision=there.commit, local_dir=folder)
        fingerprint = fingerprint_of(read_provenance(Path(folder))["hashed"])
        root = _root(Path(folder)) if ROOT in known else None
    if fingerprint != dataset.fingerprint:
        raise ValueError(
            f"{there.id}: expected a dataset of the same settings, got fingerprint {fingerprint[:12]}…, not "
            f"{dataset.fingerprint[:12]}…: use another name"
        )
    if root is not None:
        older = dataset.path / GENERATION / f"{root['generation']:06d}.json"
        kept = parse_json(read_bytes(older), str(older)) if older.is_file() else None
        _check_succession(
            root, dataset.root, kept, f"{there.id} holds", f"pull it, or use another name than {there.id}"
        )


def _check_out(out: Path, root: Mapping[str, Any]) -> None:
    """Raise ValueError where OUT holds another dataset, or one that is being encoded."""
    if any((out / PLAN).glob("*.json")):
        raise ValueError(f"{out}: expected no encode that is unfinished there; rerun it, or use another folder")
    if (out / PROVENANCE).exists():
        found = fingerprint_of(read_provenance(out)["hashed"])
        if found != root["fingerprint"]:
            raise ValueError(
                f"{out}: expected a dataset with fingerprint {root['fingerprint'][:12]}… as in the repository, it "
                f"holds one with {found[:12]}…; use another folder"
            )
    if (out / ROOT).exists():
        _check_succession(_root(out), root, None, f"{out} holds", "push it, or use another folder")


def _check_succession(
    old: Mapping[str, Any], new: Mapping[str, Any], kept: Mapping[str, Any] | None, holder: str, remedy: str
) -> None:
    """Raise ValueError unless `new` is `old` or comes after it. kept: the new one's copy of `old`, if it has one."""
    same = old["xxh3_128"] == new["xxh3_128"]
    held, names = ({one.path: one.xxh3_128 for one in _records(root)} for root in (old, new))
    other = any(names.get(name, digest) != digest for name, digest in held.items())
    other |= kept is not None and kept.get("xxh3_128") != old["xxh3_128"]
    if not same and (other or old["generation"] >= new["generation"]):
        raise ValueError(
            f"{holder} generation {old['generation']} of other rows, or a later one, than generation "
            f"{new['generation']} that would replace it; {remedy}"
        )


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: expected a folder, got a file")
    names = {one.name for one in out.iterdir()} if out.exists() else set()
    if names - {LOCK, STAGE} and not names & {ROOT, PROVENANCE}:
        raise ValueError(f"--out {out}: expected an empty folder or a pulled dataset, it holds {min(names)!r}")


def _root(folder: Path) -> dict[str, Any]:
    """dataset.json of a folder, its members of the kinds that are used here."""
    root, what = read_root(folder), str(folder / ROOT)
    natural(root, "generation", what)
    for name, kind in (("manifests", list), ("indexes", list), ("statistics", dict), ("totals", dict)):
        member(root, name, kind, what)
    member(root, "quarantine", (dict, type(None)), what)
    hexadecimal(root, "fingerprint", 64, what)
    natural(root["totals"], "rows", what)
    return root


def _records(root: Mapping[str, Any]) -> list[FileRecord]:
    """The files that a dataset.json names."""
    entries = [*root["manifests"], *root["indexes"], root["statistics"], root["quarantine"]]
    return [FileRecord.parse(one, ROOT) for one in entries if one is not None]


def _is_ours(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) > 1 and parts[0] in FOLDERS and not any(part.startswith(".") for part in parts)


def _is_whole(place: Path, record: FileRecord | ShardRecord) -> bool:
    return place.is_file() and place.stat().st_size == record.bytes and hash_file(place) == record.xxh3_128


def _batches(shards: list[ShardRecord]) -> Iterator[list[ShardRecord]]:
    batch: list[ShardRecord] = []
    for shard in shards:
        if batch and (len(batch) == COMMIT_FILES or sum(one.bytes for one in batch) + shard.bytes > COMMIT_BYTES):
            yield batch
            batch = []
        batch.append(shard)
    if batch:
        yield batch
