import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
import torch

from fastlatent import _native
from fastlatent.workflows import doctor as module


def test_reports_what_is_here(chain):
    out = chain.ok("doctor").out
    for name in ("torch", "diffusers", "safetensors", "pillow"):
        assert importlib.metadata.version(name) in next(line for line in out.splitlines() if f"  {name} " in line)
    assert "libfastlatent_cpu.so: advise_random, " in out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"decode   autoencoder in eager torch on {device}; mp4 by " in out
    if device == "cpu":
        assert "\n  encode   decoder pillow: no GPU is used\n           engine eager, on cpu, 16 images of" in out
        assert "\n           videos: decoder pyav: " in out
    else:
        assert "engine eager, above 2,000 images compile, on cuda, 64 images of" in out
    for command in ("encode", "train", "sample", "decode"):
        assert f"\n  {command} " in out


def test_every_function_of_the_library_is_named(chain):
    # Its list is written by hand.
    library = next(line for line in chain.ok("doctor").out.splitlines() if "libfastlatent_cpu.so" in line)
    header = next(path for root in map(os.fspath, sys.modules["fastlatent"].__path__)
                  if os.path.exists(path := os.path.join(root, "lib", "fastlatent.h")))  # fmt: skip
    with open(header) as file:
        names = set(re.findall(r"fastlatent_(\w+)_cpu\(", file.read()))
    assert {name.strip() for name in library.split(":", 1)[1].split(",")} == names


def test_a_missing_library_is_an_error_with_a_remedy(chain, monkeypatch):
    monkeypatch.setattr(_native, "load", lambda backend: None)
    done = chain.command("doctor")
    assert done.code == 1
    assert re.search(r"compiled library +missing", done.out)
    assert "remedy: build it: pip install ." in done.out


def test_a_library_that_does_not_load(chain, monkeypatch):
    def fail(backend):
        raise OSError("wrong ELF class")

    monkeypatch.setattr(_native, "load", fail)
    done = chain.command("doctor")
    assert done.code == 1
    assert "does not load: wrong ELF class" in done.out


@pytest.mark.parametrize(
    ("version", "ok"), [("2.11.0", True), ("2.13.0+cpu", True), ("3.0.0a1", True), ("2.9.1", False)]
)
def test_torch_versions(monkeypatch, version, ok):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert (module._torch().remedy == "") == ok


@pytest.mark.parametrize(
    ("body", "state", "remedy"),
    [
        (None, "not installed", "pip install broken-package"),
        ("raise RuntimeError('no driver')", "installed but does not import: RuntimeError: no driver", "reinstall"),
        ("import nothing_like_this", "installed but does not import: No module named 'nothing_like_this'", "reinstall"),
        ("", "present", ""),
    ],
)
def test_packages_absent_broken_and_whole(monkeypatch, tmp_path, body, state, remedy):
    if body is not None:
        (tmp_path / "broken_package.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        found = module._package("broken_package", "broken-package")
    finally:
        sys.modules.pop("broken_package", None)
    assert found.state.startswith(state)
    assert found.remedy.startswith(remedy)


def lines_of(out, name):
    """A package's line and the one after it."""
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"  {name} "))
    return lines[at], lines[at + 1].strip()


@pytest.mark.parametrize(("module_name", "name", "purpose", "install"), module.OPTIONAL)
def test_what_one_setting_needs_is_told_with_what_it_is_for(monkeypatch, module_name, name, purpose, install):
    monkeypatch.setitem(sys.modules, module_name, None)  # as if it were not there
    gone = module._optional(module_name, name, purpose, install)
    assert gone == module.Finding(name, f"not installed ({purpose})", f"pip install {install}")
    if extra := re.fullmatch(r"'fastlatent\[(\w+)\]'", install):
        requirements = importlib.metadata.requires("fastlatent")
        assert any(one.startswith(name) and f"extra == '{extra[1]}'" in one.replace('"', "'") for one in requirements)


def test_packages_are_looked_up_and_not_imported(tmp_path, monkeypatch):
    (tmp_path / "slow_package.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = module._optional("slow_package", "slow-package", "speed", "slow-package")
    assert found == module.Finding("slow-package", "present (speed)")
    assert module._optional("no_such.package", "a", "b", "c").remedy == "pip install c"


def test_their_lines(chain):
    out = chain.ok("doctor").out
    for _, name, purpose, install in module.OPTIONAL:
        line, after = lines_of(out, name)
        try:
            assert line.endswith(f" {importlib.metadata.version(name)} ({purpose})")
        except importlib.metadata.PackageNotFoundError:
            assert line.endswith(f" not installed ({purpose})") and after == f"remedy: pip install {install}"


@pytest.mark.parametrize(("broken", "decoder"), [((), "dali"), (("dali",), "nvimagecodec"), (None, "pillow")])
def test_the_decoder_on_a_gpu(monkeypatch, broken, decoder):
    from fastlatent.media import decoders

    def codec(name):
        if broken is None or name in broken:
            raise ValueError(f"{name} is missing")

    monkeypatch.setattr(decoders, "_import_codec", codec)
    decoding, engine = module._encode_paths("cuda")
    assert decoding.startswith(f"decoder {decoder}: ")
    assert ("dali is missing" in decoding) == (decoder != "dali")
    assert engine == "engine eager, above 2,000 images compile, on cuda, 64 images of 256×256 at a time"


def test_optional_packages_do_not_fail_it(chain, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # import raises ModuleNotFoundError
    done = chain.command("doctor")
    assert done.code == 0
    assert "remedy: pip install triton" in done.out


def test_needed_packages_do(chain, monkeypatch):
    original = module._package

    def package(name, *rest, **options):
        return (
            module.Finding(name, "not installed", "pip install x")
            if name == "diffusers"
            else original(name, *rest, **options)
        )

    monkeypatch.setattr(module, "_package", package)
    assert chain.command("doctor").code == 1


def test_the_probe_of_libstdcxx_runs_apart(monkeypatch):
    # Loading a library into this process to look at it would keep it here.
    calls = []
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: calls.append(a) or subprocess.CompletedProcess(a, 0, "False\n")
    )
    monkeypatch.setattr(module.ctypes.util, "find_library", lambda name: "libstdc++.so.6")
    found = module._libstdcxx()
    assert "older than GLIBCXX_3.4.29" in found.state
    assert found.remedy
    assert len(calls) == 1


def test_a_torch_that_does_not_import(monkeypatch, chain):
    real = module.importlib.import_module

    def broken(name):
        if name == "torch":
            raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.29' not found")
        return real(name)

    monkeypatch.setattr(module.importlib, "import_module", broken)
    findings = [module._torch()]
    assert "GLIBCXX_3.4.29" in findings[0].state and findings[0].remedy
