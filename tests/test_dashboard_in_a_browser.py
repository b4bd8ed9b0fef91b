"""The dashboard in a real browser, while a load runs.

With `ASGI_DB_PICTURES=docs/dashboard`, which `make pictures` sets, the load runs for nearly five
minutes first, and the pictures of the documentation are made anew.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.browsing import Browser, browser
from tests.dashboard_app import COOKIE, SECRET, Shop, load

PICTURES = os.environ.get("ASGI_DB_PICTURES")
COUNT = ".routes tr[data-key^='GET /products'] .c-units"
pytestmark = pytest.mark.timeout(900)  # the load before the pictures is part of a test
HELD = "GET /held (hold_a_connection)"


@pytest.fixture(scope="module")
def shop(module_postgresql_url: str) -> Iterator[Shop]:
    """The shop with its dashboard; each route has been asked for."""
    # For the page, a primary will do as a replica of its own.
    with Shop(module_postgresql_url, replicas=[] if PICTURES else [module_postgresql_url]) as shop:
        with load(shop):
            time.sleep(270 if PICTURES else 3)
        yield shop


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as window:
        yield window


@pytest.fixture
def page(window: Browser, shop: Shop) -> Iterator[Browser]:
    """The page of the dashboard, as an operator sees it. The browser complains of nothing."""
    window.look()
    window.open(f"{shop.address}/products/1")
    name, value = COOKIE.split("=")
    window.driver.add_cookie({"name": name, "value": value})  # pyright: ignore[reportUnknownMemberType]
    window.complaints()
    window.open(f"{shop.address}/db/")
    window.until_shown("Live", "#status")
    yield window
    assert window.complaints() == []


def count(page: Browser) -> int:
    return int(page.text(COUNT).replace(",", ""))


def test_it_follows_what_happens_while_a_load_runs(page: Browser, shop: Shop) -> None:
    """Also after the server has ended its first answer of events."""
    page.run("window.isTheSamePage = true")
    before = count(page)
    with load(shop):
        page.until(lambda: count(page) > before)
        time.sleep(6)
        later = count(page)
        page.until(lambda: count(page) > later)
        assert page.text("#status") == "Live"
    assert page.run("return window.isTheSamePage")
    assert "max" in page.text("#pool") and page.all("#pool path.curve")


def test_a_held_connection_appears_and_goes(page: Browser, shop: Shop) -> None:
    def hold() -> None:
        with shop.client() as client:
            client.get("/held")

    shop.release.clear()
    assert HELD not in page.text("#holders")
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        page.until_shown(HELD, "#holders")
        page.until_shown("SELECT count(*) AS count_1 FROM products", "#holders")
        page.until_shown("past leak_threshold", "#holders")
    finally:
        shop.release.set()
        thread.join()
    page.until(lambda: HELD not in page.text("#holders"))


def test_n_plus_1_is_marked_and_what_is_folded_out_stays_so(page: Browser, shop: Shop) -> None:
    page.one("a.chip[href*='kind=repeated']").click()
    page.until(lambda: "kind=repeated" in page.driver.current_url)
    page.until(lambda: {e.text for e in page.all(".units .function")} == {"(read_catalogue)"})
    first = page.one(".units > li")
    number = first.get_attribute("data-key")
    first.find_element("css selector", "summary").click()
    unit = f".units > li[data-key='{number}']"
    assert "12×" in page.text(unit)
    assert page.text(f"{unit} .statements .badge.repeated") == "N+1"
    with shop.client() as client:
        client.get("/catalogue")
    page.until(lambda: page.one(".units > li").get_attribute("data-key") != number)
    assert page.one(f"{unit} details").get_attribute("open") is not None
    page.driver.back()
    page.until(lambda: page.one("a.chip").get_attribute("aria-current") == "true")


def rows(page: Browser) -> list[str]:
    return [
        str(name)
        for name in page.run(
            "return [...document.querySelectorAll('#routes tbody tr')].map(e => e.dataset.key)"
        )
    ]


def test_routes_are_sorted_by_a_click_and_back_again(page: Browser) -> None:
    assert page.one("th[aria-sort]").get_attribute("data-key") == "share"
    page.run("window.isTheSamePage = true")
    page.one("th[data-key='route'] a").click()
    page.until(lambda: page.all("th[data-key='route'][aria-sort='ascending']"))
    assert rows(page) == sorted(rows(page), key=str.lower)
    page.one("th[data-key='route'] a").click()
    page.until(lambda: page.all("th[data-key='route'][aria-sort='descending']"))
    assert rows(page) == sorted(rows(page), key=str.lower, reverse=True)
    assert "sort=route" in page.driver.current_url
    page.driver.back()
    page.driver.back()
    page.until(lambda: page.all("th[data-key='share'][aria-sort='descending']"))
    assert page.run("return window.isTheSamePage")


def test_all_can_be_done_with_the_keyboard(page: Browser, shop: Shop) -> None:
    def focused() -> str:
        return str(page.run("return document.activeElement.textContent")).strip()

    def press(*keys: str) -> None:
        ActionChains(page.driver).send_keys(*keys).perform()

    press(Keys.TAB)
    assert focused() == "Skip to the content"
    press(Keys.TAB)
    assert focused() == "Pause"
    for _ in range(5):  # past the table of the replicas, and that of the routes
        press(Keys.TAB)
    assert focused() == "Outcomes"
    press(Keys.ENTER)
    page.until(lambda: page.all("th[data-key='failed'][aria-sort]"))
    with shop.client() as client:
        before = count(page)
        client.get("/products/1")
        page.until(lambda: count(page) > before)
    assert focused() == "Outcomes"  # the focus has stayed


def test_it_can_be_paused(page: Browser, shop: Shop) -> None:
    page.one("#pause").click()
    page.until_shown("Paused", "#status")
    before = count(page)
    with shop.client() as client:
        client.get("/products/1")
    time.sleep(2.5)
    assert count(page) == before
    page.one("th[data-key='units'] a").click()  # what is asked for is answered
    page.until(lambda: page.all("th[data-key='units'][aria-sort]"))
    assert page.text("#status") == "Paused"
    page.one("#pause").click()
    page.until_shown("Live", "#status")


def test_it_asks_no_other_host_and_shows_no_value(page: Browser, shop: Shop) -> None:
    list(page.requests())
    page.open(f"{shop.address}/db/?rows=all")
    page.until_shown("Live", "#status")
    asked = [urlsplit(address) for address in page.requests()]
    assert {each.netloc for each in asked if each.scheme != "data"} == {
        urlsplit(shop.address).netloc
    }
    assert {each.path for each in asked if each.scheme != "data"} == {"/db/"}
    source = page.driver.page_source
    assert SECRET not in source and "customer &lt;&gt; ?" in source


def test_who_is_not_allowed_sees_nothing(page: Browser, shop: Shop) -> None:
    page.driver.delete_all_cookies()
    page.open(f"{shop.address}/db/")
    assert page.one("body").text == "You may not see this page."
    complaints = page.complaints()
    assert len(complaints) <= 1 and all("403" in each for each in complaints)


def test_without_javascript_the_page_is_whole(page: Browser, shop: Shop) -> None:
    page.switch_javascript(on=False)
    try:
        page.open(f"{shop.address}/db/")
        assert "As of" in page.one("#status").text
        assert page.one("noscript a").is_displayed()
        assert not page.one("#pause").is_displayed()
        assert page.all("#pool path.curve") and page.all(".units summary")
        page.one("th[data-key='route'] a").click()
        page.until(lambda: page.all("th[data-key='route'][aria-sort='ascending']"))
    finally:
        page.switch_javascript(on=True)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_stands_in_the_way_of_anybody(page: Browser, width: int, dark: bool) -> None:
    page.look(width=width, height=800, dark=dark)
    page.run(
        "for (const unit of [...document.querySelectorAll('.units details')].slice(0, 9))"
        " unit.open = true"
    )
    assert page.violations() == []


def test_it_fits_into_any_window(page: Browser) -> None:
    for width in 320, 360, 500, 701, 768, 960, 1280:
        page.look(width=width, height=800)
        assert page.run("return document.documentElement.scrollWidth") <= width


def test_pictures_are_taken(page: Browser, shop: Shop, tmp_path: Path) -> None:
    """They are those of the documentation where a folder is given."""
    folder = Path(PICTURES or tmp_path)
    folder.mkdir(exist_ok=True)
    shop.release.clear()

    def hold() -> None:
        with shop.client() as client:
            client.get("/held")

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        with load(shop):
            page.until_shown("past leak_threshold", "#holders")
            page.open(f"{shop.address}/db/")
            page.until_shown("Live", "#status")
            for name, width, height, dark in (
                ("light", 1280, 1240, False),
                ("dark", 1280, 1240, True),
                ("small", 360, 1240, False),
            ):
                page.look(width=width, dark=dark)
                time.sleep(0.5)
                page.picture(folder / f"{name}.png", height=height)
            page.look()
            page.open(f"{shop.address}/db/?kind=repeated")
            page.run("document.querySelector('.units details').open = true")
            page.until_shown("Live", "#status")
            page.run("document.querySelector('#units-title').scrollIntoView()")
            page.picture_of("section[aria-labelledby='units-title']", folder / "units.png")
    finally:
        shop.release.set()
        holder.join()
    assert {file.name for file in folder.glob("*.png")} == {
        "light.png",
        "dark.png",
        "small.png",
        "units.png",
    }
