"""A headless Chromium, for tests marked ``browser``."""

import contextlib
import os
from urllib.parse import urlsplit

import numpy as np
from scipy.optimize import linear_sum_assignment
from suite_settings import CHROMIUM

#: Milliseconds that a page may take for anything: for one that hangs.
PATIENCE = 120_000


@contextlib.contextmanager
def browser(*arguments):
    """Playwright's browser, by the machine's Chromium."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, 'tests in a browser are required, and there is no Chromium'
    # Chromium's sandbox refuses root.
    arguments += ('--no-sandbox',) * (os.geteuid() == 0)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(arguments))
        try:
            yield opened
        finally:
            opened.close()


def same_rows(found, wanted):
    """Whether boxes, scores and labels, (n, 6), are the same, one to one, but for rounding."""
    found, wanted = np.reshape(found, (-1, 6)), np.reshape(wanted, (-1, 6))
    if found.shape != wanted.shape:
        return False
    apart = (np.abs(found[:, None] - wanted) > [2e-2] * 4 + [1e-3, 0.5]).any(2)
    return not apart[linear_sum_assignment(apart)].any()


class Page:
    """A page with a viewer, and all that it asked for and complained of.

    Args:
        opened: A browser.
        url (str): What to open.
        size (tuple[int, int]): Of the window.
        **settings: Of Playwright's contexts.
    """

    def __init__(self, opened, url, size=(1280, 900), **settings):
        self.context = opened.new_context(viewport=dict(width=size[0], height=size[1]), **settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.asked, self.errors = [], []
        self.page.on('request', lambda request: self.asked.append(request.url))
        self.page.on('pageerror', lambda error: self.errors.append(str(error)))
        self.page.goto(url)

    def foreign(self):
        """Addresses of other servers that were asked for."""
        schemes = ('http', 'https', 'ws', 'wss')
        return [
            url
            for url in self.asked
            if urlsplit(url).scheme in schemes and urlsplit(url).hostname != '127.0.0.1'
        ]

    def wait_for(self, pictures, named=None):
        """Until a set of so many pictures is shown, the first of a name."""
        self.page.wait_for_selector(f'.dd[data-pictures="{pictures}"]', state='attached')
        if named:
            self.page.wait_for_selector(f'.dd-chosen img[alt="{named}"]')

    def slide(self, slider, value):
        self.page.locator(f'.dd-{slider}').evaluate(
            '(input, value) => { input.value = value; input.dispatchEvent(new Event("input")); }',
            value,
        )

    def boxes(self, where='.dd-chosen'):
        """Boxes, scores and labels, (n, 6), of a panel, best first."""
        rows = self.page.eval_on_selector_all(
            f'{where} .dd-box',
            'boxes => boxes.map(({dataset: {box, score, label}}) =>'
            ' [...box.split(",").map(Number), +score, +label])',
        )
        return rows[::-1]

    def exits(self):
        """At which exit each picture of the strip leaves."""
        return self.page.eval_on_selector_all(
            '.dd-thumb', 'all => all.map((one) => +one.dataset.exit)'
        )

    def threshold(self):
        return float(self.page.get_attribute('.dd', 'data-threshold'))

    def width(self):
        """How wide all of the page is."""
        return self.page.evaluate('document.documentElement.scrollWidth')
