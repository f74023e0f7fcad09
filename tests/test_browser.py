"""A report in headless Chromium: its figures are drawn and move, nothing is complained about, and it fits a phone."""

import shutil

import pytest
from conftest import is_picture
from report_runs import collapsing
from test_report import HOSTILE

from lightning_nc import History
from lightning_nc.report import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="Debian's packages chromium and chromium-driver are not installed"
    ),
]
SHAPES = {"desktop": 1280, "phone": 360}


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Chromium in a container has no sandbox and little shared memory; WebGL is drawn by the processor.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--enable-unsafe-swiftshader"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports: of a long run with three classes in the plane, of four in space, and of two runs with hostile names."""
    folder = tmp_path_factory.mktemp("reports")
    state = collapsing(5, layers=("layer1",)).state()
    state["history"] = [
        {key.replace("layer1", HOSTILE): value for key, value in row.items()} for row in state["history"]
    ]
    hostile = History.from_state(state)
    return {
        "plane": write_report({"plane": collapsing(200)}, folder / "plane.html"),
        "space": write_report({"space": collapsing(8, layers=(), chosen=(0, 1, 2, 3))}, folder / "space.html"),
        "hostile": write_report({HOSTILE: hostile, "b": hostile}, folder / "hostile.html"),
    }


def wait_for(browser, script):
    """The value of a script as soon as it is true."""
    return WebDriverWait(browser, 60, 0.05).until(lambda _: browser.execute_script(script))


def show(browser, page, shape="desktop", scheme="light"):
    """Open a page as a kind of screen shows it."""
    size = {"width": SHAPES[shape], "height": 900, "deviceScaleFactor": 1, "mobile": shape == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def scroll_to(browser, selector):
    """Show an element; figures are drawn when they come near the screen."""
    browser.execute_script(f"document.querySelector('{selector}').scrollIntoView()")


def complaints(browser):
    """What the console says but for the driver of the graphics card."""
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


PLACES = """return document.querySelector('[data-moving] .plot').data.map(
    trace => [trace.name, [...trace.x], [...trace.y], [...(trace.z || [])]])"""
DRAWN = "return document.querySelector('[data-moving] .plot').data !== undefined"


@pytest.mark.parametrize("page", ["plane", "space"])
def test_the_slider_moves_the_classes(browser, pages, page):
    show(browser, pages[page])
    scroll_to(browser, "[data-moving]")
    wait_for(browser, DRAWN)
    assert browser.execute_script("return document.querySelector('[data-moving] output').textContent").startswith(
        "epoch 0"
    )
    first = {name: rest for name, *rest in browser.execute_script(PLACES)}
    browser.execute_script(
        """const slider = document.querySelector('[data-moving] input');
        slider.value = slider.max;
        slider.dispatchEvent(new Event('input', { bubbles: true }));"""
    )
    last = {name: rest for name, *rest in browser.execute_script(PLACES)}
    assert first.keys() == last.keys()
    assert first["ideal frame"] == last["ideal frame"]
    for name in first:
        assert (first[name] != last[name]) == ("samples" in name or "mean" in name or "row" in name), name
    for label in range(3):  # the clouds were wide before they collapsed
        spread = [
            max(rest[0]) - min(rest[0]) for rest in (first[f"class {label}, samples"], last[f"class {label}, samples"])
        ]
        assert spread[0] > 10 * spread[1]
    assert complaints(browser) == []


def test_play_runs_to_the_last_epoch_and_stops(browser, pages):
    show(browser, pages["space"])
    scroll_to(browser, "[data-moving]")
    wait_for(browser, DRAWN)
    browser.execute_script("document.querySelector('[data-moving] button').click()")
    assert wait_for(browser, "return document.querySelector('[data-moving] output').textContent.startsWith('epoch 3')")
    assert wait_for(browser, "return document.querySelector('[data-moving] button').textContent === 'Play'")
    assert browser.execute_script("return document.querySelector('[data-moving] input').value") == "7"


def test_every_figure_is_drawn_where_it_is_scrolled_to(browser, pages):
    show(browser, pages["plane"])
    count = browser.execute_script("return document.querySelectorAll('.plot').length")
    for place in range(count):
        browser.execute_script(f"document.querySelectorAll('.plot')[{place}].scrollIntoView()")
        wait_for(browser, f"return document.querySelectorAll('.plot')[{place}].querySelector('.main-svg') !== null")
    assert complaints(browser) == []


def test_buttons_hide_and_show_curves(browser, pages):
    show(browser, pages["plane"])
    scroll_to(browser, "#figure0")
    wait_for(browser, "return document.getElementById('figure0').data !== undefined")
    shown = "return document.getElementById('figure0').data.map(trace => trace.visible)"
    assert browser.execute_script(shown) == [True] * 5
    browser.execute_script("document.querySelector('fieldset[data-group=layer] button').click()")
    assert browser.execute_script(shown) == [False] + [True] * 4
    browser.execute_script("document.querySelector('fieldset[data-group=layer] button').click()")
    assert browser.execute_script(shown) == [True] * 5


def test_a_click_on_a_column_sorts_the_classes(browser, pages):
    show(browser, pages["plane"])
    column = """return [...document.querySelectorAll('tbody tr')].filter(row => row.cells.length > 2)
        .map(row => Number(row.cells[1].dataset.value))"""
    before = browser.execute_script(column)
    assert before == sorted(before, reverse=True)
    for order in (sorted(before), sorted(before, reverse=True)):
        browser.execute_script("document.querySelectorAll('th button')[1].click()")
        assert browser.execute_script(column) == order


def test_hostile_names_are_shown_and_not_run(browser, pages):
    show(browser, pages["hostile"])
    assert browser.execute_script("return document.querySelector('h2 ~ section h2').textContent") == HOSTILE
    scroll_to(browser, "#figure0")
    wait_for(browser, "return document.getElementById('figure0').querySelector('.main-svg') !== null")
    assert browser.execute_script("return document.images.length") == 0
    assert complaints(browser) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_page_fits_the_screen_and_follows_its_colors(browser, pages, shape, scheme, tmp_path):
    show(browser, pages["plane"], shape, scheme)
    scroll_to(browser, "[data-moving]")
    wait_for(browser, DRAWN)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    ink, page = browser.execute_script(
        """const style = getComputedStyle(document.body);
        return [style.color, style.backgroundColor].map(color => color.match(/\\d+/g).reduce((sum, part) => sum + +part, 0))"""
    )
    assert (ink < page) == (scheme == "light")
    color = browser.execute_script(
        "return document.querySelector('[data-moving] .plot').data.find(t => t.marker).marker.color"
    )
    assert color == {"light": "#0072B2", "dark": "#56B4E9"}[scheme]
    picture = tmp_path / f"{shape}-{scheme}.png"
    browser.save_screenshot(str(picture))
    assert is_picture(picture)
    assert complaints(browser) == []
