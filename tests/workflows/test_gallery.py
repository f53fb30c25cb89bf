"""The gallery in a headless Chromium: what is seen is what was decoded, in step, with nothing from elsewhere.

Without Chromium the tests that need it are skipped; FASTLATENT_REQUIRE_CHROMIUM=1 makes that a failure. The picture of
the page goes to FASTLATENT_SCREENSHOT where that is set, otherwise to test_gallery-screenshot0/gallery.png of pytest's
folder.
"""

import base64
import io
import json
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlatent.config import GalleryConfig
from fastlatent.media.videos import video_info
from fastlatent.workflows import gallery as workflow
from fastlatent.workflows.gallery import gallery

av = pytest.importorskip("av")

FPS, FRAMES, SHORT = 10, 12, 5  # SHORT: frames of the last row
HOSTILE = (
    '</script><script>window.injected = 1</script><!-- <script> --> <img src=x onerror="window.injected=1"> & "雪" '
    "@DATA@ @MEDIA@ \u2028"
)
# (row, step) → how the video is stored; rows and steps that are not here are missing, None failed.
STORED = {
    (0, 0): "mp4", (0, 1): "mp4", (0, 10): "mp4",
    (1, 0): "large mp4", (1, 1): None, (1, 10): "lossless mp4",
    (2, 0): "png-frames", (2, 1): "gif",
}  # fmt: skip
STEPS = ("step_000", "step_001", "step_010")
NUMBERS = (0, 1, 10)
VIDEOS = ("prompt_000/vid_000", "prompt_000/vid_001", "prompt <b>é, [1]</b>/vid_000")


def colour(row, step, frame):
    """Of a whole frame; neighbours differ by 20 or more, H.264 and its colours of limited range by up to 6."""
    return 40 + 80 * row, 40 + 80 * NUMBERS.index(step), 10 + 20 * frame


def frames(row, step, height, width):
    count = SHORT if row == 2 else FRAMES
    return [np.full((height, width, 3), colour(row, step, i), np.uint8) for i in range(count)]


def write_mp4(path, images, crf=12):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "x264-params": "colorprim=bt709:transfer=bt709:colormatrix=bt709"}
        for image in images:
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_video(folder, name, row, step, kind):
    if kind == "png-frames":
        (folder / name).mkdir()
        for i, image in enumerate(frames(row, step, 48, 64)):
            Image.fromarray(image).save(folder / name / f"{i:06d}.png")
        return name
    if kind == "gif":
        first, *others = [Image.fromarray(image) for image in frames(row, step, 48, 64)]
        first.save(folder / f"{name}.gif", save_all=True, append_images=others, duration=1000 // FPS, loop=0)
        return f"{name}.gif"
    height, width = (360, 480) if kind == "large mp4" else (48, 64)
    write_mp4(folder / f"{name}.mp4", frames(row, step, height, width), crf=0 if kind == "lossless mp4" else 12)
    return f"{name}.mp4"


def step_record(folder, row, step, name, kind):
    bad = step == 10 and row == 1
    latent = {"shape": [1, 16, 2, 4, 6], "mean": None if bad else 0.1 * step, "std": 1.0, "nan": 7 if bad else 0}
    record = {
        "decode_time": 0.25,
        "notes": ["<i>note</i>"],
        "latent": {**latent, "min": -3.0 - step, "max": 4.5},
        "metadata": {"prompt": f"row {row}: {HOSTILE}", "timestep": 1000 - step, "sigma": float("nan")},
    }
    if kind is None:
        return record | {"success": False, "output": None, "error": f"out of memory {HOSTILE}"}
    output = f"{VIDEOS[row]}/{write_video(folder / VIDEOS[row], name, row, step, kind)}"
    return record | {"success": True, "output": output, "error": None, "fps": FPS}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    root = tmp_path_factory.mktemp("experiment") / "toy <script> é"
    decoded = root / "latents_videos"
    videos = {}
    for row, video in enumerate(VIDEOS):
        (decoded / video).mkdir(parents=True)
        steps = {
            name: step_record(decoded, row, step, name, STORED[row, step])
            for name, step in zip(STEPS, NUMBERS, strict=True)
            if (row, step) in STORED
        }
        videos[video] = {"total_steps": len(steps), "steps": steps}
    summary = {"model_id": "toy/model", "video_summaries": videos}
    (decoded / "decode_summary.json").write_text(json.dumps(summary))
    return root


@pytest.fixture(scope="module")
def page_file(experiment):
    gallery(GalleryConfig(folder=str(experiment)))
    return experiment / "gallery.html"


def data_of(text):
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    return json.loads(found)


def medium_of(text, number):
    (found,) = re.findall(f'<script id="media-{number}" type="text/plain">([A-Za-z0-9+/=]*)</script>', text)
    return base64.b64decode(found)


def test_page_holds_the_videos(experiment, page_file, tmp_path):
    text = page_file.read_text()
    data = data_of(text)
    assert data["steps"] == list(STEPS)
    assert [row["video"] for row in data["rows"]] == ["vid_000", "vid_001", "vid_000"]
    kept, (large, failed, lossless), (folder, gif, missing) = (row["steps"] for row in data["rows"])
    for entry, name in zip(kept, STEPS, strict=True):  # small already: byte for byte
        assert medium_of(text, entry["media"]) == (experiment / f"latents_videos/{VIDEOS[0]}/{name}.mp4").read_bytes()
    assert failed["media"] is None and failed["error"].startswith("out of memory") and missing is None
    for entry, size in ((large, (320, 240)), (lossless, (64, 48)), (folder, (64, 48)), (gif, (64, 48))):
        (tmp_path / "clip.mp4").write_bytes(medium_of(text, entry["media"]))
        count = FRAMES if entry in (large, lossless) else SHORT
        assert tuple(video_info(tmp_path / "clip.mp4")) == (count, *size, FPS)
        with av.open(str(tmp_path / "clip.mp4")) as container:
            # The profile of --crf 0, "High 4:4:4 Predictive", plays in no browser but Chromium.
            assert "4:4:4" not in container.streams.video[0].codec_context.profile


def test_texts_of_others_end_no_script(page_file):
    text = page_file.read_text()
    assert text.count("<script") == 2 + 7  # data, code, and the seven videos
    assert "window.injected" not in text.replace("u003ewindow.injected", "").replace('=\\"window.injected', "")
    assert "<title>toy &lt;script&gt; é</title>" in text
    assert "default-src 'none'" in text and "unsafe" not in text


def test_filters(experiment, tmp_path):
    config = GalleryConfig(
        folder=str(experiment), output=str(tmp_path / "new" / "page.html"), video_filter="vid_000", step_filter="last",
        height=0,
    )  # fmt: skip
    gallery(config)
    data = data_of((tmp_path / "new" / "page.html").read_text())
    # The last of each video; that of the third is step_001.
    assert data["steps"] == ["step_001", "step_010"]
    assert [[entry is not None for entry in row["steps"]] for row in data["rows"]] == [[False, True], [True, False]]


def test_damaged_and_missing_videos_are_told(experiment, tmp_path):
    decoded = experiment / "latents_videos"
    shutil.copytree(decoded / VIDEOS[0], tmp_path / VIDEOS[0])
    shutil.copy(decoded / "decode_summary.json", tmp_path)
    (tmp_path / VIDEOS[0] / "step_000.mp4").write_bytes(b"no video")
    (tmp_path / VIDEOS[0] / "step_001.mp4").unlink()
    gallery(GalleryConfig(folder=str(tmp_path), prompt_filter="prompt_000", video_filter="vid_000"))
    steps = data_of((tmp_path / "gallery.html").read_text())["rows"][0]["steps"]
    assert [entry["media"] for entry in steps] == [None, None, 2]
    assert "step_000.mp4 cannot be read" in steps[0]["error"] and "step_001.mp4 is missing" in steps[1]["error"]


def test_too_large_a_page_leaves_the_old_one(experiment, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("old")
    monkeypatch.setattr(workflow, "MAX_PAGE_BYTES", 24_000)
    with pytest.raises(ValueError, match=r"more than 0 MB .* choose a smaller --height, fewer steps"):
        gallery(GalleryConfig(folder=str(experiment), output=str(page)))
    assert page.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root.rmdir(), "expected a folder, got nothing there"),
        (lambda root: None, "expected decode_summary.json, .*; got an empty folder"),
        (lambda root: (root / "latents").mkdir(), "nothing is decoded yet; run `fastlatent decode"),
        (lambda root: (root / "images.jsonl").write_text(""), "expected at least one image"),
        (lambda root: (root / "images.jsonl").write_text('{"file": "../x.png"}'), "line 1: expected a path inside"),
        (lambda root: (root / "decode_summary.json").write_text("{"), "decode_summary.json: expected JSON"),
        (lambda root: (root / "decode_summary.json").write_text("[]"), "expected a JSON object"),
        (lambda root: (root / "decode_summary.json").write_text('{"video_summaries": {}}'), "no step was decoded"),
        (lambda root: (root / "gallery.html").mkdir(), "gallery.html is a folder"),
    ],
)  # fmt: skip
def test_bad_folders(make, message, tmp_path):
    root = tmp_path / "folder"
    root.mkdir()
    make(root)
    with pytest.raises(ValueError, match=message):
        gallery(GalleryConfig(folder=str(root)))


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    required = os.environ.get("FASTLATENT_REQUIRE_CHROMIUM") == "1"
    if found is None and not required:
        pytest.skip("no Chromium here: apt-get install chromium (FASTLATENT_REQUIRE_CHROMIUM=1 makes this a failure)")
    assert found is not None, "FASTLATENT_REQUIRE_CHROMIUM=1, and no chromium or chrome is on PATH"
    if not required:
        pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a file; afterwards there must have been no error, no script of others, and no request but for itself."""
    pages = []

    def opened(path, **options):
        page = browser.new_page(viewport={"width": 1100, "height": 1000}, **options)
        seen = {"errors": [], "requests": []}
        page.on("console", lambda message: seen["errors"].append(message.text))
        page.on("pageerror", lambda error: seen["errors"].append(str(error)))
        page.on("request", lambda request: seen["requests"].append(request.url))
        pages.append((page, seen))
        page.goto(path.as_uri())
        return page

    yield opened
    for page, seen in pages:
        assert seen["errors"] == []
        assert [url for url in seen["requests"] if not url.startswith(("file:", "data:", "blob:"))] == []
        assert sum(url.startswith("file:") for url in seen["requests"]) == 1  # the page itself
        assert page.evaluate("window.injected") is None
        page.close()


SETTLED = """() => [...document.querySelectorAll("video[src]")].every(
    video => video.readyState >= 2 && !video.seeking && !video.error)"""


def settle(page):
    """Wait until every player shows what it shall show, and has been painted."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.wait_for_function(SETTLED)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def seen_colour(locator):
    """Of the middle of an element on the screen."""
    image = Image.open(io.BytesIO(locator.screenshot())).convert("RGB")
    return image.getpixel((image.width // 2, image.height // 2))


def near(seen, row, step, frame):
    return max(abs(a - b) for a, b in zip(seen, colour(row, step, frame), strict=True)) <= 8


def test_slider_moves_every_player(page_file, open_page, tmp_path_factory):
    page = open_page(page_file)
    rows = page.locator("article")
    assert rows.count() == 3
    page.locator("#slider").focus()
    page.keyboard.press("End")
    for place, step in ((2, 10), (1, 1), (0, 0)):
        settle(page)
        assert page.locator("#step").inner_text() == f"{STEPS[place]} ({place + 1} of 3)"
        assert page.locator("#slider").get_attribute("aria-valuetext") == STEPS[place]
        for row in range(3):
            player = rows.nth(row).locator(".player")
            if STORED.get((row, step)):
                assert near(seen_colour(player), row, step, 0), (row, step, seen_colour(player))
            else:
                expected = "step_001 failed\nout of memory " + HOSTILE if row == 1 else "step_010: not decoded"
                assert " ".join(player.inner_text().split()) == " ".join(expected.split())
                assert not player.locator("video").is_visible()
            cells = rows.nth(row).locator(".cell")
            assert [cells.nth(i).get_attribute("aria-pressed") for i in range(3)] == [
                "true" if i == place else "false" for i in range(3)
            ]
        page.keyboard.press("ArrowLeft")
    kinds = rows.nth(1).locator(".cell").evaluate_all("cells => cells.map(cell => cell.className.trim())")
    assert kinds == ["cell", "cell failed", "cell"]
    assert rows.nth(2).locator(".cell.missing").count() == 1
    # A thumbnail is of the middle frame, and takes the slider along.
    assert near(seen_colour(rows.nth(0).locator(".cell img").nth(2)), 0, 10, FRAMES // 2)
    rows.nth(0).locator(".cell").nth(2).click()
    settle(page)
    assert page.locator("#slider").input_value() == "2"
    # Plots: mean, std, min and max, and NaN only where there is one; the marker stands at the step.
    assert [rows.nth(row).locator(".plots figure").count() for row in range(3)] == [3, 4, 3]
    assert {line.get_attribute("x1") for line in rows.nth(0).locator(".marker").all()} == {"195"}
    assert rows.nth(0).locator(".plots figure").nth(2).inner_text().split("\n") == ["min … max", "-13 … 4.5"]
    assert "row 0: </script><script>window.injected" in page.locator("section > p").nth(0).inner_text()
    page.locator("#slider").fill("0")  # as the mouse does
    settle(page)
    assert near(seen_colour(page.locator(".player").nth(2)), 2, 0, 0)
    target = os.environ.get("FASTLATENT_SCREENSHOT")
    path = Path(target) if target else tmp_path_factory.mktemp("test_gallery-screenshot") / "gallery.png"
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=path, full_page=True)
    assert path.stat().st_size > 10_000


def test_players_run_in_step(page_file, open_page):
    page = open_page(page_file, color_scheme="dark")
    page.keyboard.press("Home")  # nothing: only the arrows, space, comma and full stop mean something
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    settle(page)
    page.keyboard.press("Space")
    assert page.locator("#play").inner_text() == "Pause"
    page.wait_for_function("() => document.querySelector('video').currentTime > 0.15")
    # Two rounds of 1.2 s. In the middle one is knocked out of step, and must find back within 0.8 s.
    samples = page.evaluate("""() => new Promise(done => {
      const videos = [...document.querySelectorAll("video")], begin = performance.now(), samples = [];
      let knocked = false;
      const tick = now => {
        samples.push([now - begin, ...videos.map(video => video.src ? video.currentTime : null)]);
        if (now - begin > 1300 && !knocked) {
          knocked = true;
          videos[1].currentTime = (videos[0].currentTime + 0.5) % 1.2;
        }
        if (now - begin < 2600) requestAnimationFrame(tick); else done(samples);
      };
      requestAnimationFrame(tick);
    })""")
    moments, *times = np.array(samples, dtype=float).T
    assert (np.diff(times[0]) < -0.5).sum() >= 1  # it began anew
    assert times[0].max() > 0.9 and len(np.unique(times[0])) > 15  # it did move
    undisturbed = (moments <= 1300) | (moments > 2100)
    # Nine of ten samples: this machine may do something else for a moment. Without the clock a quarter is off.
    for other, ahead in ((times[1], times[0]), (times[2], np.minimum(times[0], SHORT / FPS))):
        assert np.quantile(np.abs(ahead - other)[undisturbed], 0.9) <= 1 / FPS
    page.keyboard.press("Space")
    settle(page)
    frame = int(page.locator("#frame").inner_text().split()[1]) - 1
    for wanted, key in ((frame, None), (frame + 1, "."), (frame, ","), (frame - 1, ",")):
        if key:
            page.keyboard.press(key)
        settle(page)
        wanted %= FRAMES
        assert page.locator("#frame").inner_text() == f"frame {wanted + 1} of {FRAMES}"
        for row in range(3):
            seen = seen_colour(page.locator(".player").nth(row))
            assert near(seen, row, 0, min(wanted, SHORT - 1) if row == 2 else wanted), (row, wanted, seen)
    # Another step while they run: the same place in time. So slowly that no machine takes until the end of the video.
    for _ in range((FRAMES // 2 - wanted) % FRAMES):
        page.keyboard.press(".")
    page.locator("#speed").select_option("0.1")
    page.locator("#play").click()
    page.wait_for_function("() => !document.querySelector('video').paused")
    before = page.evaluate("document.querySelector('video').currentTime")
    page.keyboard.press("ArrowRight")
    settle(page)
    page.wait_for_function("() => !document.querySelector('video').paused")
    after = page.evaluate("document.querySelector('video').currentTime")
    assert before <= after + 0.25 / FPS < before + 0.5  # who is less than a quarter of a frame away is not moved
    page.keyboard.press("Space")  # the button was clicked, not reached by the keyboard: the key means pause, once
    assert page.locator("#play").inner_text() == "Play"


def test_images(open_page, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    for i, (value, size) in enumerate(zip(colours, ((32, 32), (500, 500), (32, 48)), strict=True)):
        Image.new("RGB", size, value).save(tmp_path / f"images/{i:06d}.png")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "images/000003.tiff")
    (tmp_path / "images/000004.png").write_bytes(b"broken")
    files = sorted(path.name for path in (tmp_path / "images").iterdir())
    lines = [{"file": f"images/{name}", "name": f"{i} <b>{HOSTILE}", "label": i} for i, name in enumerate(files)]
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gallery(GalleryConfig(folder=str(tmp_path)))
    assert "4 images, 1 unreadable" in capsys.readouterr().out
    text = (tmp_path / "gallery.html").read_text()
    assert medium_of(text, 0) == (tmp_path / "images/000000.png").read_bytes()
    assert Image.open(io.BytesIO(medium_of(text, 1))).size == (240, 240)

    page = open_page(tmp_path / "gallery.html")
    buttons = page.locator("#images button")
    assert buttons.count() == 5
    page.wait_for_function("() => [...document.querySelectorAll('#images img')].every(image => image.naturalWidth)")
    for i, value in enumerate([*colours, (128, 128, 128)]):
        seen = seen_colour(buttons.nth(i).locator("img"))
        assert max(abs(a - b) for a, b in zip(seen, value, strict=True)) <= 4, (i, seen)
    assert "label: 1" in buttons.nth(1).inner_text() and "1 <b></script>" in buttons.nth(1).inner_text()
    assert "no readable" in buttons.nth(4).inner_text()
    buttons.nth(1).click()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('dialog img').naturalWidth === 32")
    large = page.locator("dialog img")
    assert large.bounding_box()["height"] > 500
    assert seen_colour(large)[2] > 150 and "label: 2" in page.locator("dialog p").inner_text()
    page.keyboard.press("Escape")
    assert not large.is_visible()
