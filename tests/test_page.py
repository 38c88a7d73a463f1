"""report/index.html: what it holds, and in a real browser what it shows."""

import shutil

import numpy as np
import pytest
from test_report import BROKEN, add, call, files, read, write_run, write_seeds

import report
from common import save_video


def test_what_is_left_out_is_summed_up_in_a_line_per_reason(tmp_path, capsys, monkeypatch):
    add(tmp_path, write_run(tmp_path / "one"))
    for algo in ("bc", "cql", "lompo"):
        (*_, run) = write_seeds(tmp_path, [40, 44, 48], algo=algo)
        (run / "evaluation.mp4").write_bytes(bytes(90_000))
    bad = [write_run(tmp_path / "runs" / str(i), seed=i) for i in range(4)]
    for run, name in zip(bad, ("without evaluations", "without evaluations", "unfinished", "missing key")):
        BROKEN[name][0](run)
    curve = next((tmp_path / "results" / "curves").rglob("*.csv"))
    curve.write_text("step,score\n100")
    capsys.readouterr()
    monkeypatch.setattr(report, "PAGE_BYTES", 300_000)  # room for two of the videos
    call(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert len(lines) == 5 and lines[0].startswith(f"left out: {curve}: broken")
    assert "left out: 2 (listed in the page): never evaluated (--eval-every 0), so there is no score" in lines
    assert f"left out: {bad[2]}: not finished; its command continues" in lines
    assert lines[4].endswith("seed2/evaluation.mp4: no room for the video in a page of 0.3 MB")
    names = {"index.html", "table.csv", "curves-walker-walk-medium-made-441.23.png"}
    assert set(files(tmp_path / "report")) == names
    assert [row["seeds"] for row in read(tmp_path / "report" / "table.csv")] == ["3"] * 3
    page = (tmp_path / "report" / "index.html").read_text()
    assert all(f'"{path}"' in page for path in (*bad, curve))
    assert page.count("data:video/mp4;base64,AAAA") == 2  # as they are


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


SCRIPTS = """
window.all = selector => [...document.querySelectorAll(selector)];
window.rows = () => all("#table tbody tr:not(.part)").map(row => [...row.cells].map(cell => cell.innerText));
window.choose = (name, value) => {
    const select = all(`[name=${name}]`)[0];
    select.value = value;
    select.dispatchEvent(new Event("change"));
    return [rows().length, all("#cards section").length, all("#none")[0].hidden];
};
window.point = (x, y) => {  // in units of the first chart
    const svg = all("#cards svg[role]")[0], box = svg.getBoundingClientRect();
    const place = {clientX: box.left + x * box.width / 520, clientY: box.top + y * box.height / 250};
    svg.dispatchEvent(new PointerEvent("pointermove", place));
    return all(".reading")[0].innerText;
};"""
PLAY = """const done = arguments[0], [video] = all("video");
video.ontimeupdate = () => { if (video.currentTime > 0.2) done(video.currentTime); };
video.play().catch(error => done(String(error)))"""


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path, browser):
    run = browser.execute_script
    shipped = write_seeds(tmp_path, [10, 15, 20], algo="bc") + write_seeds(tmp_path, [9], algo="bc", task="cheetah-run")
    save_video(shipped[0] / "evaluation.mp4", [np.full((3, 84, 84), 5 * i, np.uint8) for i in range(40)])
    add(tmp_path, *shipped)
    shutil.rmtree(tmp_path / "runs")
    write_seeds(tmp_path, [40, 45, 50])
    write_seeds(tmp_path, [40], tag="same")
    write_seeds(tmp_path, [33], dataset="medium-84px-20000-seed123456", quick=True, tag="</script>")
    call(tmp_path)
    for width in (1400, 500):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get((tmp_path / "report" / "index.html").as_uri())
        run(SCRIPTS)
        assert run("return document.documentElement.scrollWidth") <= width  # nothing sticks out
        assert run("return all('tr.part').map(e => e.innerText)") == ["Your runs", "From results/"]
        shown, table = run("return rows()"), read(tmp_path / "report" / "table.csv")
        assert [row["algo"] for row in table] == ["drq_bc"] * 3 + ["bc"] * 2
        names = [(row["task"], row["dataset"], f"{row['algo']}:{row['tag']}".rstrip(":")) for row in table]
        assert [(task, dataset, name.split("\n")[0]) for task, dataset, name, *_ in shown] == names
        assert [cell.split("\n") for cell in shown[0][2:]] == [
            ["drq_bc", "uncommitted code"], ["3"], ["45.0", "[32.6, 57.4]"], ["44.0", "[31.6, 56.4]"],
            ["46.8 ± 2.3"], ["made, 44.1"], ["300"], ["0 min", "2 cores of X, Y, bf16, eager"],
        ]  # fmt: skip
    assert "1 rows" in run("return all('#aggregate')[0].innerText")
    for name, value, left in (("task", "cheetah-run", [1, 1, True]), ("algo", "drq_bc", [0, 0, False]),
                              ("task", "", [1, 1, True]), ("algo", "", [5, 3, True])):  # fmt: skip
        assert run("return choose(...arguments)", name, value) == left
    for name, left in (("quick", 4), ("shipped", 2), ("shipped", 4)):
        run(f"all('[name={name}]')[0].click()")
        assert len(run("return rows()")) == left
    first, same = "seed 0 40.0, seed 1 45.0, seed 2 50.0", "drq_bc:same, 300 updates, at 300: seed 0 40.0"
    assert run("return point(510, 12 + 208 * 0.6)") == f"drq_bc, 300 updates, at 300: {first}; {same}"  # both lines
    assert run("return [all('.data').length, new Set(all('.mean').map(e => e.getAttribute('stroke'))).size]") == [2, 2]
    assert 0.2 < browser.execute_async_script(PLAY) < 0.9  # from its start
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
