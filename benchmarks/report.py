"""Size of a report of 200 epochs and five layers, and how long it takes to open, as a ratio to a page with one small figure.

python benchmarks/report.py

Both pages hold plotly.js, which is most of them. Each opening is in a browser of its own, so that nothing is compiled already.
Times are from the start of the navigation to the end of loading, when words and tables can be read, and to the first figure.
"""

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from plotly.graph_objects import Figure, Scatter
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from report_runs import collapsing

from lightning_nc.report import write_report

OPENINGS = 5
LOADED = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
DRAWN = "return document.querySelector('.main-svg') && performance.now()"


def open_page(page: Path) -> tuple[float, float]:
    """Milliseconds until a page is loaded, and until its first figure is drawn."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--enable-unsafe-swiftshader"):
        options.add_argument(argument)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        browser.get("about:blank")
        browser.get(page.as_uri())
        loaded = browser.execute_script(LOADED)
        browser.execute_script("document.querySelector('.plot, .plotly-graph-div').scrollIntoView()")
        return loaded, WebDriverWait(browser, 60, 0.01).until(lambda _: browser.execute_script(DRAWN))


def main() -> None:
    """Print a row per page."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        print("benchmarks/report.py is left out: it needs Debian's packages chromium and chromium-driver")
        return
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.html", Path(folder) / "large.html"
        Figure(Scatter(y=[1, 2])).write_html(small, include_plotlyjs=True)
        write_report({"a run": collapsing(200)}, large)
        pages = {"one small figure": small, "report": large}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in pages}
        for _ in tqdm(range(OPENINGS), "Openings", leave=False):
            for name, page in pages.items():
                times[name].append(open_page(page))
        print(f"{'':18}{'MB':>6}{'loaded, ms':>12}{'first figure, ms':>18}{'ratio':>8}")
        base = statistics.median(drawn for _, drawn in times["one small figure"])
        for name, page in pages.items():
            loaded, drawn = (statistics.median(each) for each in zip(*times[name], strict=True))
            size = page.stat().st_size / 1e6
            print(f"{name:18}{size:6.1f}{loaded:12.0f}{drawn:18.0f}{drawn / base:8.2f}")


if __name__ == "__main__":
    main()
