"""A report in a real Chromium without a window: it works, says nothing in the console and requests nothing.

Needs Debian's packages chromium and chromium-driver, which .ci/run installs. Without them the tests are skipped, unless
DIALOG_JAX_NEEDS_BROWSER is set.
"""

import json
import os
import pathlib
import shutil
import tempfile
import time
import unittest
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest
from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException, ElementNotInteractableException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from dialog_jax.audit.figures import make_audit
from dialog_jax.dialogues import parsing
from dialog_jax.evaluation.token_scores import TokenScores
from dialog_jax.rendering.sequences import Renderer
from dialog_jax.report import dialogue_views, page
from dialog_jax.trees.dialogue_trees import TreeConfig
from dialog_jax.trees.objectives import ObjectiveConfig
from tests.rendering import chat_templates
from tests.report import pages

pytestmark = pytest.mark.full
_SECONDS = 10  # to wait for something to appear
_PLAIN, _LONGER, _ANSWERS, _WEIGHTED, _ATTACK = range(5)


def _find_programs():
    return shutil.which("chromium"), shutil.which("chromedriver")


def start_browser():
    """Chromium, which notes every message of the console and every request."""
    options = webdriver.ChromeOptions()
    options.binary_location, driver = _find_programs()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


class BrowserCase(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if not all(_find_programs()):
            message = "chromium and chromedriver are not installed: apt-get install chromium chromium-driver"
            assert not os.environ.get("DIALOG_JAX_NEEDS_BROWSER"), message
            raise unittest.SkipTest(message)
        cls.directory = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.browser = start_browser()
        cls.addClassCleanup(cls.browser.quit)

    def open(self, file, *, fragment=""):
        self.browser.get("about:blank")
        self.browser.get_log("browser")
        self.browser.get(f"{file.as_uri()}{fragment}")

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait_for(self, selector):
        WebDriverWait(self.browser, _SECONDS).until(lambda _: self.all(selector), f"there is no {selector}")
        return self.all(selector)[0]

    def click(self, element):
        """Clicks on an element once nothing covers it; charts that are still being drawn move what is below them."""

        def try_to_click(browser):
            browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
            element.click()
            return True

        ignored = (ElementClickInterceptedException, ElementNotInteractableException)
        WebDriverWait(self.browser, _SECONDS, ignored_exceptions=ignored).until(try_to_click)

    def style(self, element, name):
        return element.value_of_css_property(name)


class ReportTest(BrowserCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        base, data, run = pages.write_run(cls.directory)
        cls.html, _, error = pages.write_report(cls.directory, run, data, base, "--dialogues=10")
        assert cls.html, error
        cls.file = cls.directory / "report.html"

    def setUp(self):
        super().setUp()
        self.browser.set_window_size(1280, 900)
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        self.open(self.file)
        self.wait_for("#list tbody tr")

    def open_dialogue(self, place):
        self.browser.execute_script(f"location.hash = '#/dialogue/{place}'")
        WebDriverWait(self.browser, _SECONDS).until(lambda _: f"dialogue/{place}" in self.browser.current_url)
        self.wait_for("#tokens .t[data-node]")
        time.sleep(0.1)  # the second layout, once the dialogue is visible

    def names(self):
        return [element.text for element in self.all("#list tbody a")]

    def choose(self, name, value):
        self.browser.execute_script(f"document.querySelector(`input[name={name}][value='{value}']`).click()")

    def test_page_draws_its_charts_without_a_message_or_a_request(self):
        for chart in self.all("figure[data-chart]"):
            self.browser.execute_script("arguments[0].scrollIntoView()", chart)
            WebDriverWait(self.browser, _SECONDS).until(lambda _, chart=chart: chart.find_elements(By.TAG_NAME, "svg"))
        self.assertGreaterEqual(len(self.all("figure svg")), 8)
        for place in range(10):
            self.open_dialogue(place)
        self.assertEmpty(self.browser.get_log("browser"))
        requested = [
            message["params"]["request"]["url"]
            for message in (json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance"))
            if message["method"] == "Network.requestWillBeSent"
        ]
        own = self.file.as_uri()
        others = [url for url in requested if not url.startswith((own, "data:", "about:", "blob:"))]
        self.assertIn(own, requested)
        self.assertEmpty(others)
        loaded = self.browser.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
        self.assertEmpty([url for url in loaded if not url.startswith("data:")])

    def test_curve_is_zoomed_by_its_buttons_and_shows_a_point_on_hover(self):
        figure = self.wait_for("figure[data-chart='chart-0']")
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", figure)
        self.wait_for("figure[data-chart='chart-0'] svg")

        def labels():
            return [one.text for one in figure.find_elements(By.CSS_SELECTOR, ".role-axis-label text") if one.text]

        def press(label):
            before = labels()
            self.click(figure.find_element(By.XPATH, f".//button[text()='{label}']"))
            WebDriverWait(self.browser, _SECONDS).until(lambda _: labels() and labels() != before)
            return labels()

        whole = labels()
        self.assertNotEqual(press("+"), whole)
        self.assertEqual(press("all"), whole)
        webdriver.ActionChains(self.browser).move_to_element(figure.find_element(By.TAG_NAME, "svg")).perform()
        tooltip = self.wait_for("#vg-tooltip-element.visible").text
        self.assertRegex(tooltip, r"step\s*:?\s*\d")

    def test_hover_shows_the_figures_of_the_token(self):
        self.open_dialogue(_LONGER)
        columns, texts = pages.read_dialogue(self.html, _LONGER), pages.read_texts(self.html)
        node = int(np.flatnonzero(columns["weight"] > 0)[3])
        span = self.wait_for(f".t[data-node='{node}']")
        webdriver.ActionChains(self.browser).move_to_element(span).perform()
        card = self.wait_for("#card:not([hidden])")
        losses = columns["loss"][:, node]
        shown = [element.text for element in card.find_elements(By.CSS_SELECTOR, "[data-loss]")]
        self.assertEqual(shown, [f"{loss:.3f}" for loss in losses])
        change = card.find_element(By.CSS_SELECTOR, "[data-change]").text
        self.assertAlmostEqual(float(change.replace("\N{MINUS SIGN}", "-")), losses[1] - losses[0], delta=1e-3)
        words = [element.text.removesuffix(" ✓") for element in card.find_elements(By.CSS_SELECTOR, ".word-cell")]
        likeliest = [texts["spellings"][token] for token in columns["top"][:, :, node].T.ravel()]
        self.assertEqual(
            [word.strip() for word in words], [json.dumps(one, ensure_ascii=False)[1:-1].strip() for one in likeliest]
        )
        self.assertIn("assistant, message 2, turn 0 · weight 1", card.text)

    def test_search_finds_a_word_of_a_message(self):
        search = self.wait_for("#search")
        search.send_keys("QUESTION 7")
        WebDriverWait(self.browser, _SECONDS).until(lambda _: len(self.names()) == 2)
        self.assertTrue(all("longer" in name for name in self.names()))
        self.assertEqual(self.all("#list mark")[0].text.lower(), "question")
        self.assertEqual(self.wait_for("#count").text, "2 of 10 dialogues")
        search.send_keys(" nowhere")
        self.assertEmpty(self.names())

    def test_list_is_sorted_by_loss_improvement_and_length(self):
        report = pages.read_data(self.html)["dialogues"]
        figures = {
            "loss after, highest first": lambda one: -one["losses"][1],
            "change, most improved first": lambda one: one["losses"][1] - one["losses"][0],
            "length, longest first": lambda one: -one["tokens"],
        }
        select = self.wait_for("#sort")
        for label, key in figures.items():
            select.find_element(By.XPATH, f"option[text()='{label}']").click()
            expected = [one["name"] for one in sorted(report, key=key)]
            self.assertEqual(self.names(), expected)
        heading = self.all("#list thead button")[3]  # tokens
        self.click(heading)
        tokens = [int(row.find_elements(By.TAG_NAME, "td")[2].text) for row in self.all("#list tbody tr")]
        self.assertEqual(tokens, sorted(tokens))
        self.assertEqual(self.all("#list thead th")[3].get_attribute("aria-sort"), "ascending")

    def test_dark_mode_follows_the_system_and_the_button(self):
        def brightness():
            color = self.style(self.wait_for("body"), "background-color")
            return sum(int(part) for part in color.strip("rgba()").split(",")[:3]) / 3

        self.assertGreater(brightness(), 200)
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.assertLess(brightness(), 60)
        button = self.wait_for("#theme")
        self.click(button)
        self.assertEqual(button.text, "Theme: light")
        self.assertGreater(brightness(), 200)
        self.click(button)
        self.assertLess(brightness(), 60)

    def test_text_of_a_dialogue_stays_text(self):
        self.open_dialogue(_ATTACK)
        shown = "".join(
            self.browser.execute_script("return arguments[0].textContent", bubble)
            for bubble in self.all(".bubble .tokens")
        )
        self.assertEqual(shown.replace("·", "").count(pages.ATTACK), 2)  # for a token that ends within a character
        self.assertNotIn("attacked", self.browser.title)
        self.assertEmpty(self.browser.get_log("browser"))

    def test_keyboard_opens_a_dialogue_and_moves_among_its_tokens(self):
        search = self.wait_for("#search")
        search.send_keys("answers")
        link = self.wait_for("#list tbody a")
        for _ in range(30):
            if self.browser.switch_to.active_element == link:
                break
            self.browser.switch_to.active_element.send_keys(Keys.TAB)
        self.browser.switch_to.active_element.send_keys(Keys.ENTER)
        self.wait_for("#tokens .t[data-node]")
        for _ in range(30):
            if "t" in (self.browser.switch_to.active_element.get_attribute("class") or "").split():
                break
            webdriver.ActionChains(self.browser).send_keys(Keys.TAB).perform()
        active = self.browser.switch_to.active_element
        first = int(active.get_attribute("data-node"))
        self.assertEqual(self.style(active, "outline-style"), "solid")
        active.send_keys(Keys.ARROW_RIGHT)
        active = self.browser.switch_to.active_element
        second = int(active.get_attribute("data-node"))
        self.assertGreater(second, first)
        self.assertTrue(self.wait_for("#card").is_displayed())
        self.assertRegex(
            self.wait_for("#live").get_attribute("textContent"), "loss before .*, loss after .*, likeliest"
        )
        active.send_keys(Keys.ARROW_DOWN)
        active = self.browser.switch_to.active_element
        self.assertGreater(int(active.get_attribute("data-node")), second)
        active.send_keys(Keys.ESCAPE)
        self.assertEqual(self.browser.switch_to.active_element.get_attribute("id"), "dialogue-heading")

    def test_tree_has_every_token_once_and_chat_follows_the_chosen_branch(self):
        self.open_dialogue(_ANSWERS)
        size = len(pages.read_dialogue(self.html, _ANSWERS)["gap"])
        self.choose("layout", "tree")
        nodes = [int(span.get_attribute("data-node")) for span in self.all("#tokens .t[data-node]")]
        self.assertCountEqual(nodes, range(size))
        self.assertLen(self.all(".branch"), 1)
        self.choose("layout", "chat")
        before = self.wait_for("#tokens").text
        other = self.wait_for(".fork button[aria-pressed='false']")
        self.click(other)
        self.assertNotEqual(self.wait_for("#tokens").text, before)
        texts = {"Hello, friend!" in text for text in (before, self.wait_for("#tokens").text)}
        self.assertEqual(texts, {True, False})

    def test_weights_and_masks_are_visible(self):
        self.open_dialogue(_WEIGHTED)
        columns = pages.read_dialogue(self.html, _WEIGHTED)
        for span in self.all("#tokens .t[data-node]"):
            weight = columns["weight"][int(span.get_attribute("data-node"))]
            classes = span.get_attribute("class").split()
            self.assertEqual(("on" in classes, "part" in classes), (weight > 0, weight not in (0, 1)))
        self.assertEqual(self.all(".weight-label")[0].text, "\N{MULTIPLICATION SIGN}0.5")

    def test_color_is_stronger_where_the_loss_is_higher(self):
        self.open_dialogue(_LONGER)
        loss = pages.read_dialogue(self.html, _LONGER)["loss"]
        for model in range(2):
            self.choose("color", f"loss-{model}")
            strength = {
                int(span.get_attribute("data-node")): float(
                    span.get_attribute("style").partition("--a:")[2].strip("; ")
                )
                for span in self.all("#tokens .t.hot")
            }
            order = sorted(strength, key=lambda node: loss[model, node])
            strengths = [strength[node] for node in order]
            self.assertGreater(len(set(strengths)), 5)
            self.assertEqual(strengths, sorted(strengths))

    def test_page_fits_a_phone(self):
        metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            self.open(self.file)
            self.wait_for("#list tbody tr")
            for place in (None, _LONGER, _ANSWERS):
                if place is not None:
                    self.open_dialogue(place)
                    self.choose("layout", "tree")
                width = self.browser.execute_script("return document.documentElement.scrollWidth")
                self.assertLessEqual(width, 390)
        finally:
            self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def test_parts_have_names_for_a_screen_reader(self):
        tree = self.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        roles: dict[str, list[str]] = {}
        for node in tree:
            if not node.get("ignored"):
                roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
        for role in ("main", "banner", "navigation", "search", "contentinfo", "figure"):
            self.assertIn(role, roles)
        for role in ("button", "link", "searchbox", "combobox", "figure", "region", "navigation"):
            self.assertNotIn("", roles.get(role, []), role)
        summary = self.all("figure summary")[0]
        self.browser.execute_script("arguments[0].click()", summary)
        self.assertGreater(len(self.wait_for("figure table").find_elements(By.TAG_NAME, "tr")), 6)


class LargeReportTest(BrowserCase):
    """200 dialogues of 1,000 tokens, with losses and alternatives that compress as badly as a large model's."""

    def test_page_is_small_and_opens_quickly(self):
        rng = np.random.default_rng(0)
        tokenizer = chat_templates.train_tokenizer("chatml")
        renderer, objective = Renderer(tokenizer), ObjectiveConfig()
        letters = [chr(code) for code in range(0x4E00, 0x9E00)]
        file = self.directory / "large.jsonl"
        with file.open("w") as lines:
            for number in range(20):
                # A character is about three tokens, one of them of its own.
                messages = [
                    {"role": ("user", "assistant")[i % 2], "content": "".join(rng.choice(letters, 33))}
                    for i in range(10)
                ]
                lines.write(json.dumps({"id": number, "messages": messages}) + "\n")
        dialogues = list(parsing.iterate_dialogues(str(file)))
        views, _ = dialogue_views.make_views(dialogues, "training", renderer, objective, 20)
        views *= 10  # what is large of a dialogue are its scores
        sizes = [len(view.tree.tokens) for view in views]
        self.assertBetween(np.mean(sizes), 950, 1150)
        models = [page.ScoredModel(name, [_draw_scores(rng, size) for size in sizes]) for name in ("before", "after")]
        audit = make_audit(dialogues, tokenizer, renderer, TreeConfig(max_length=2048))
        # Spellings of a vocabulary of 49,152 tokens.
        words = [f" {''.join(rng.choice(list('abcdefghijklmnopqrst'), 6))}" for _ in range(1 << 16)]
        with mock.patch.object(page.token_columns.Texts, "_spell", lambda self, tokens: [words[one] for one in tokens]):
            html = page.render(
                title="large",
                runs=[],
                audit=audit,
                data_name="large",
                max_length=2048,
                views=views,
                models=models,
                renderer=renderer,
                notes=[],
                remarks=[],
            )
        self.assertLess(len(html.encode()), 10e6)
        out = self.directory / "large.html"
        out.write_text(html, encoding="utf-8")
        seconds = []
        for _ in range(3):  # the least: other work on the machine only adds to it
            started = time.perf_counter()
            self.open(out)
            self.wait_for("#list tbody tr")
            seconds.append(time.perf_counter() - started)
        self.assertLess(min(seconds), 2)
        self.assertLen(self.all("#list tbody tr"), 200)
        self.browser.execute_script("location.hash = '#/dialogue/150'")
        self.wait_for("#tokens .t[data-node]")
        self.assertEmpty(self.browser.get_log("browser"))


def _draw_scores(rng, size):
    """Losses and alternatives of a made-up model with 49,152 tokens, whose frequencies follow Zipf's law."""
    token = np.minimum(rng.zipf(1.3, (size, 3)), 49151).astype(np.int32)
    probability = np.sort(rng.dirichlet((1.0,) * 6, size)[:, :3].astype(np.float32), axis=1)[:, ::-1]
    nll = rng.gamma(1.0, 2.5, size).astype(np.float32)
    nll[0] = np.nan
    return TokenScores(nll, token, probability)


if __name__ == "__main__":
    absltest.main()
