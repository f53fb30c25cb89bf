import datetime
import fnmatch
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from toy_experiment import make_experiment

from fastlatent.sources.experiment import CONFIG, Experiment, Step, open_experiment, select, step_metadata

CONTENT = b"not read by this module"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return make_experiment(
        tmp_path_factory.mktemp("toy") / "Batch_20250101_120000", steps=(0, 1, 10), shape=(1, 1, 2, 1, 2)
    )


def folder(root: Path, *files: str, config: bytes | None = None) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)
    if config is not None:
        (root / "configs").mkdir(parents=True)
        (root / CONFIG).write_bytes(config)
    return root


def named(steps) -> list[str]:
    return [f"{step.folder}/{step.name}" for step in steps]


def steps_of(tree: dict[str, dict[str, list[str]]]) -> list[Step]:
    return [
        Step(prompt, video, name, Path(prompt, video, f"{name}.npy"))
        for prompt, videos in tree.items()
        for video, names in videos.items()
        for name in names
    ]


# The folder


def test_experiment_as_it_is_left(toy):
    experiment = open_experiment(toy)
    videos = [f"prompt_00{i}/vid_00{j}" for i in (0, 1) for j in (0, 1)]
    assert named(experiment.steps) == [f"{v}/step_0{n}" for v in videos for n in ("00", "01", "10")]
    first = experiment.steps[0]
    assert first == Step(
        "prompt_000", "vid_000", "step_000", toy / "latents" / "prompt_000" / "vid_000" / "step_000.npy.gz"
    )
    assert experiment.problem is None
    assert experiment.model_id() == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert experiment.fps() == 16
    assert experiment.size() == (5, 8, 16)  # 2 latent frames of 1×2 in Wan's strides 4 and 8
    metadata = step_metadata(first)
    assert (metadata["step"], metadata["sigma"], metadata["prompt"]) == (0, 1.0, "a boat on the sea, number 0")


def test_numbers_sort_by_value_and_every_format_is_a_step(tmp_path):
    names = ["step_2.npy", "step_10.npy.gz", "step_1.pt", "step_3.pt.gz", "step_100.safetensors"]
    root = folder(tmp_path, *(f"latents/p{i}/v{j}/{n}" for i in (10, 2) for j in (1,) for n in names))
    # Names of letters only, of numbers only, and with the number elsewhere sort together.
    folder(
        root, "latents/p/v/step_.npy", "latents/2/v/step_x.npy", "latents/p2a/v/step_07.npy", "latents/p2a/v/step_7.npy"
    )
    expected = ["2/v/step_x", "p/v/step_"]
    expected += [f"p2/v1/step_{n}" for n in (1, 2, 3, 10, 100)] + ["p2a/v/step_07", "p2a/v/step_7"]
    expected += [f"p10/v1/step_{n}" for n in (1, 2, 3, 10, 100)]
    assert named(open_experiment(root).steps) == expected


def test_what_is_no_step_is_left_out(tmp_path):
    left_out = [
        "latents/p/v/.step_001.npy",
        "latents/p/v/step_001.npy.tmp",
        "latents/p/v/step_001.tmp.npy",
        "latents/p/v/step_001.part.npy.gz",
        "latents/p/v/step_001_metadata.json",
        "latents/p/v/summary.json",
        "latents/p/v/latent_001.npy",
        "latents/p/.hidden/step_001.npy",
        "latents/.hidden/v/step_001.npy",
        "latents/step_001.npy",
        "latents/p/v/deeper/step_001.npy",
    ]
    root = folder(tmp_path, "latents/p/v/step_000.npy", *left_out)
    (root / "latents/p/v/step_002.npy").mkdir()
    assert named(open_experiment(root).steps) == ["p/v/step_000"]


def test_folders_of_videos_alone_have_no_prompt(tmp_path):
    root = folder(tmp_path, "latents/p000_b000_s001/step_000.npy", "latents/p000_b000_s000/step_000.npy")
    steps = open_experiment(root).steps
    assert [(step.prompt, step.folder) for step in steps] == [("", "p000_b000_s000"), ("", "p000_b000_s001")]
    assert named(select(steps, video_filter="*_s001", step_filter="last")[0]) == ["p000_b000_s001/step_000"]
    with pytest.raises(ValueError, match="there are no prompt folders, only latents/VIDEO"):
        select(steps, prompt_filter="*")


def test_links_are_followed(tmp_path):
    elsewhere = folder(tmp_path / "elsewhere", "v/step_000.npy")
    root = folder(tmp_path / "root", "latents/p/v/step_000.npy")
    (root / "latents" / "linked").symlink_to(elsewhere)
    (root / "latents" / "p" / "w").symlink_to(elsewhere / "v")
    (root / "latents" / "self").symlink_to(root / "latents" / "self")
    (root / "latents" / "p" / "v" / "step_001.npy").symlink_to("nowhere")  # listed: reading it says what is wrong
    (root / "latents" / "p" / "v" / "step_002.npy").symlink_to("step_002.npy")
    expected = ["linked/v/step_000", *(f"p/v/step_00{n}" for n in range(3)), "p/w/step_000"]
    assert named(open_experiment(root).steps) == expected


def test_one_step_in_two_formats(tmp_path):
    root = folder(tmp_path, "latents/p/v/step_000.npy", "latents/p/v/step_000.pt.gz", "latents/p/v/step_001.npy")
    with pytest.raises(ValueError, match=r"p/v: step_000.npy and step_000.pt.gz are both step_000"):
        open_experiment(root)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), r"expected latents/PROMPT/VIDEO/step_\* .*\.safetensors, got no folder latents but: none"),
        (("videos/a.mp4",), "no folder latents but: videos$"),
        (("b/latents/p/v/step_0.npy", "a/x"), "no folder latents but: a, b; give one of the experiments: b"),
        (("latents/p/v/step_0.npz", "latents/p/v/.x"), "other files in .*: 'p/v/step_0.npz'$"),
        (("latents/p/v/.x",), "empty folders in .*latents: p$"),
        (tuple(f"latents/p/v/{i}.txt" for i in range(23)), "'p/v/19.txt' and 3 more$"),
    ],
)
def test_no_latents(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        open_experiment(folder(tmp_path, *files))


def test_not_an_experiment(tmp_path, toy):
    with pytest.raises(ValueError, match="gone: expected an experiment folder, got nothing there"):
        open_experiment(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: expected an experiment folder, got a file"):
        open_experiment(tmp_path / "file")
    with pytest.raises(ValueError, match=f"the latents themselves; give the folder above, {toy}"):
        open_experiment(toy / "latents")
    (tmp_path / "latents").mkdir()
    with pytest.raises(ValueError, match="an empty .*latents$"):
        open_experiment(tmp_path)


# The settings

LAUGHS = b"a: &a [x,x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(8)
)
MERGES = b"a: &a {x: 1}\n" + b"".join(
    b"%c: &%c {<<: [%s]}\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(8)
)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "expected the experiment's settings, got nothing there .*no folder configs"),
        (b"", "got an empty file"),
        (b"model_settings: [", "not plain YAML: ParserError"),
        (b"\xff\xfe\x00", "not plain YAML"),
        (b"a: \x01", "not plain YAML: ReaderError"),
        (b"- model_settings", "expected a mapping of sections, got list"),
        (b"a: 1\n---\nb: 2", "not plain YAML: ComposerError"),
        (b"a: !!python/object/apply:os.system [exit]", "not plain YAML: ConstructorError"),
        (b"a: !!bool x", "not plain YAML: KeyError"),  # PyYAML's own slips, here and in the next two
        (b'a: !!int ""', "not plain YAML: IndexError"),
        (b"a: !!timestamp x", "not plain YAML: AttributeError"),
        (b"a: 2020-99-99", "not plain YAML: ValueError"),
        (b"a: " + b"[\n" * 5000, "not plain YAML: RecursionError"),
        (b"a: &a [*a]", "an alias inside of what it stands for"),
        (LAUGHS, "more than 100000 values, with aliases written out"),
        (MERGES, "more than 100000 values"),
        (b"#" * (2**20 + 1), "expected at most 1048576 bytes of settings, got 1048577"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_settings_that_cannot_be_read(tmp_path, config, message):
    experiment = open_experiment(folder(tmp_path, "latents/p/v/step_0.npy", config=config))
    assert experiment.settings == {} and experiment.problem
    with pytest.raises(ValueError, match=f"{message}.*--vae"):
        experiment.model_id()
    assert experiment.fps() is None and experiment.size() is None


def test_a_folder_in_place_of_the_settings(tmp_path):
    folder(tmp_path, "latents/p/v/step_0.npy", "configs/other.yaml")
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(ValueError, match=r"got nothing there \(in .*configs: generation_config.yaml, other.yaml\)"):
        open_experiment(tmp_path).model_id()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"video_settings: {fps: 8}\n1: 2", "got the sections video_settings, 1;"),
        (b"model_settings: [a]", "got the sections model_settings;"),
        (b"model_settings: {seed: 1, sampler: unipc}", "got model_settings with seed, sampler;"),
        (b"model_settings: {model_id: }", "expected text for model_settings.model_id, got None;"),
        (b"model_settings: {model_id: ' '}", "expected text for model_settings.model_id, got ' ';"),
        (b"model_settings: {model_id: 3}", "expected text for model_settings.model_id, got 3;"),
    ],
)
def test_no_model_id(tmp_path, config, message):
    experiment = open_experiment(folder(tmp_path, "latents/p/v/step_0.npy", config=config))
    assert experiment.problem is None
    with pytest.raises(ValueError, match=f"{message} .*--vae"):
        experiment.model_id()


def test_aliases_and_other_plain_yaml_are_read(tmp_path):
    config = (
        b"base: &b {fps: 24}\nvideo_settings: {<<: *b, frames: 9}\nmodel_settings: {model_id: ' a/b '}\nday: 2025-01-01"
    )
    experiment = open_experiment(folder(tmp_path, "latents/p/v/step_0.npy", config=config))
    assert (experiment.model_id(), experiment.fps()) == ("a/b", 24)
    assert experiment.settings["day"] == datetime.date(2025, 1, 1)


def with_video(**values) -> Experiment:
    return Experiment(Path("root"), (), {"video_settings": values})


@pytest.mark.parametrize(
    ("fps", "expected"), [(16, 16), (12.5, 12.5), ("24", 24), ("24000/1001", 24000 / 1001), (" 8.0 ", 8), (None, None)]
)
def test_fps(fps, expected):
    assert with_video(fps=fps).fps() == expected


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf, True, "fast", "1/0", [16], 1001, "1e400", 10**400])
def test_fps_that_is_none(fps):
    with pytest.raises(ValueError, match=r"generation_config.yaml: expected video_settings.fps .*; give --fps"):
        with_video(fps=fps).fps()


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        ({"width": 848, "height": "480", "frames": 61.0}, (61, 480, 848)),
        ({"width": 848, "height": 480, "fps": 16, "duration": 3.83}, (61, 480, 848)),  # int(61.28)
        ({"width": 848, "height": 480}, None),
        ({"width": 848, "frames": 61}, None),
        ({"width": 848.5, "height": 480, "frames": 61}, None),
        ({"width": "wide", "height": 480, "frames": 61}, None),
        ({"width": 0, "height": 480, "frames": 61}, None),
        ({"width": 848, "height": 480, "fps": math.nan, "duration": 1}, None),
    ],
)
def test_size(video, expected):
    assert with_video(**video).size() == expected


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff", b"[" * 10**5, b" " * (2**20 + 1)])
def test_metadata_that_is_damaged_is_none(tmp_path, content):
    step = open_experiment(folder(tmp_path, "latents/p/v/step_000.npy.gz")).steps[0]
    path = tmp_path / "latents/p/v/step_000_metadata.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert step_metadata(step) == {}
    if content == b"":
        path.write_text('{"sigma": NaN, "timestep": 3, "prompt": "\\u00e9"}')
        assert step_metadata(step) == {"sigma": None, "timestep": 3, "prompt": "é"}
        json.dumps(step_metadata(step), allow_nan=False)


# Filters


def test_three_lists_of_names_combine(toy):
    steps = open_experiment(toy).steps
    chosen, warnings = select(steps, "prompt_000,prompt_001", "vid_001, vid_000", "step_000,step_010,")
    assert named(chosen) == [
        f"prompt_00{i}/vid_00{j}/{n}" for i in (0, 1) for j in (0, 1) for n in ("step_000", "step_010")
    ]
    assert warnings == []
    assert select(steps) == (list(steps), [])


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        # `prompt_00` is no substring search, and no name of another level counts.
        ({"prompt": "prompt_000", "step": "first"}, ["prompt_000/a/step_0", "prompt_000/b/step_1"]),
        ({"video": "first", "step": "last"}, ["prompt_000/a/step_2", "prompt_001/b/step_3"]),
        # Places are counted before other filters: the last video of prompt_001 is c.
        ({"video": "last", "prompt": "*1"}, ["prompt_001/c/step_0"]),
        ({"step": "every:2", "prompt": "first"}, ["prompt_000/a/step_0", "prompt_000/a/step_2", "prompt_000/b/step_1"]),
        ({"step": "first,last", "video": "b"}, ["prompt_000/b/step_1", "prompt_001/b/step_3"]),
        (
            {"video": "[ab]", "step": "step_[!0]"},
            [f"prompt_{p}" for p in ("000/a/step_1", "000/a/step_2", "000/b/step_1", "001/b/step_3")],
        ),
        (
            {"prompt": "every:99"},
            ["prompt_000/a/step_0", "prompt_000/a/step_1", "prompt_000/a/step_2", "prompt_000/b/step_1"],
        ),
    ],
)
def test_filters(filters, expected):
    tree = {
        "prompt_000": {"a": ["step_0", "step_1", "step_2"], "b": ["step_1"]},
        "prompt_001": {"b": ["step_3"], "c": ["step_0"]},
    }
    chosen, warnings = select(steps_of(tree), *(filters.get(what) for what in ("prompt", "video", "step")))
    assert (named(chosen), warnings) == (expected, [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b", {"a,b"}),  # a name as it stands, before the list of two names
        ("a,b,a", {"a,b", "a"}),
        ("b,a", {"b", "a"}),
        ("b, a,b ", {"b", "a,b"}),
        ("p[0]", {"p[0]"}),  # not the glob, which means p0
        ("p[0-9]", {"p0"}),
        ("p[[]0]", {"p[0]"}),
        ("first", {"first"}),  # not the first, which is "a"
        (" a", {" a"}),
        ("é ü", {"é ü"}),
        ("*", {"a", "b", "a,b", "p[0]", "p0", "first", " a", "é ü", "A"}),
        ("A", {"A"}),
        ("last,?", {"A", "a", "b"}),
    ],
)
def test_names_with_commas_brackets_spaces(text, expected):
    names = ["a", "b", "a,b", "p[0]", "p0", "first", " a", "é ü", "A"]
    chosen, warnings = select(steps_of({name: {"v": ["step_0"]} for name in names}), prompt_filter=text)
    assert ({step.prompt for step in chosen}, warnings) == (expected, [])


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (("", None, None), "prompt filter: expected names separated by commas, got ''"),
        ((None, " , ,", None), "video filter: expected names separated by commas"),
        ((None, None, "every:0"), "step filter: expected every:N with a whole number N of at least 1, got 'every:0'"),
        ((None, None, "every:x"), "step filter: expected every:N"),
        (
            ("prompt_0", None, None),
            "prompt filter 'prompt_0' matches nothing; did you mean 'prompt_000'.; there are: prompt_000, ",
        ),
        ((None, None, "step_1"), "did you mean 'step_001'"),  # the same number, not what looks most alike
        ((None, None, "19"), "did you mean 'step_019'"),
        ((None, None, "STEP_003"), "did you mean 'step_003'"),
        ((None, None, "step_003.npy.gz"), "did you mean 'step_003'"),
        ((None, None, "zz"), "step filter 'zz' matches nothing; there are: step_000, .*, step_019 and 5 more$"),
        (("prompt_001", "vid_0", None), "video filter 'vid_0' matches none of what the filters before it left: vid_1"),
    ],
)
def test_filters_that_match_nothing(filters, message):
    steps = [f"step_{i:03d}" for i in range(25)]
    tree = {"prompt_000": {"vid_0": steps}, "prompt_001": {"vid_1": steps}}
    with pytest.raises(ValueError, match=message):
        select(steps_of(tree), *filters)


def test_a_part_that_matches_nothing_is_a_warning():
    steps = steps_of({"p": {"v": ["step_000", "step_019"]}})
    chosen, warnings = select(steps, "p,q*", None, "step_000,step_19")
    assert named(chosen) == ["p/v/step_000"]
    assert warnings == [
        "prompt filter: 'q*' matches nothing",
        "step filter: 'step_19' matches nothing; did you mean 'step_019'?",
    ]


def plain_selection(tree: dict, filters: list[str | None]) -> set[tuple[str, str, str]]:
    """The rules read one after another, for names and filters in which no comma is part of a name."""

    def passes(text: str | None, name: str, siblings: list[str], everywhere: set[str]) -> bool:
        if text is None:
            return True
        for part in filter(None, (part.strip() for part in text.split(","))):
            if part in everywhere:
                passed = part == name
            elif part == "first":
                passed = siblings.index(name) == 0
            elif part == "last":
                passed = siblings.index(name) == len(siblings) - 1
            elif part.startswith("every:"):
                passed = siblings.index(name) % int(part[6:]) == 0
            else:
                passed = fnmatch.fnmatchcase(name, part)
            if passed:
                return True
        return False

    videos = {video for some in tree.values() for video in some}
    names = {name for some in tree.values() for all_names in some.values() for name in all_names}
    return {
        (prompt, video, name)
        for prompt, some in tree.items()
        for video, all_names in some.items()
        for name in all_names
        if passes(filters[0], prompt, list(tree), set(tree))
        and passes(filters[1], video, list(some), videos)
        and passes(filters[2], name, all_names, names)
    }


NAMES = st.sampled_from(["a", "b", "ab", "a1", "a10", "[a]", "first", "é", "a b"])
PARTS = st.one_of(
    NAMES,
    st.sampled_from(
        ["first", "last", "every:1", "every:2", "every:3", "*", "?", "a*", "[ab]", "[!a]*", "", " a ", "zz", "["]
    ),
)
FILTERS = st.one_of(st.none(), st.lists(PARTS, min_size=1, max_size=4).map(",".join))
TREES = st.dictionaries(
    NAMES,
    st.dictionaries(NAMES, st.lists(NAMES, min_size=1, max_size=4, unique=True), min_size=1, max_size=3),
    min_size=1,
    max_size=4,
)


def check_against_plain(tree, filters):
    expected = plain_selection(tree, filters)
    try:
        chosen, _ = select(steps_of(tree), *filters)
    except ValueError:
        assert not expected
    else:
        assert expected and [(s.prompt, s.video, s.name) for s in chosen] == [
            (s.prompt, s.video, s.name) for s in steps_of(tree) if (s.prompt, s.video, s.name) in expected
        ]


@given(TREES, st.tuples(FILTERS, FILTERS, FILTERS))
@example({"first": {"a": ["b", "a"]}, "a": {"a": ["first"]}}, ("last", "first", "first"))
def test_filters_against_a_plain_reading_of_the_rules(tree, filters):
    check_against_plain(tree, filters)


@pytest.mark.soak
@hypothesis_settings(max_examples=5_000)
@given(TREES, st.tuples(FILTERS, FILTERS, FILTERS))
def test_filters_against_a_plain_reading_at_length(tree, filters):
    check_against_plain(tree, filters)


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=5, unique=True))
@example("[", ["["])
@example(",," * 2000, ["a,b,c"])
def test_any_text_is_a_filter_or_a_clear_error(text, names):
    steps = steps_of({name: {"v": ["step_0"]} for name in names})
    try:
        chosen, _ = select(steps, prompt_filter=text)
    except ValueError as error:
        assert str(error).startswith("prompt filter")
    else:
        assert chosen
    # Every name can be chosen alone by writing it.
    for name in names:
        assert [step.prompt for step in select(steps, prompt_filter=name)[0]] == [name]


@pytest.mark.soak
def test_a_large_experiment_is_listed_quickly(tmp_path):
    root = folder(
        tmp_path, *(f"latents/p{i}/v{j}/step_{k:03d}.npy" for i in range(20) for j in range(10) for k in range(50))
    )
    steps = open_experiment(root).steps
    assert len(steps) == 10_000
    assert len(select(steps, "every:2", "first,last", "every:5")[0]) == 10 * 2 * 10


def test_no_torch():
    code = "import sys, fastlatent.sources.experiment; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


def test_the_toy_config_is_what_yaml_reads(toy):
    sections = yaml.safe_load((toy / CONFIG).read_text())
    assert {"model_settings", "video_settings", "latent_analysis_settings", "attention_analysis_settings"} <= set(
        sections
    )
    assert sections["model_settings"]["sampler"] == "unipc"
