"""The page of `make sample` in a headless browser, over a session that a test steers: no model."""

import threading
import time
from collections.abc import Iterator

import pytest

from ctrl_jax.commands import sample_page
from ctrl_jax.commands.sample_session import Comparing, Drawn, Picked, Response, Rewards, Scored
from ctrl_jax.errors import InputError
from ctrl_jax.report import sample_page as shown_page
from ctrl_jax.runtime.web import Server

NASTY = '<img src=x onerror="document.title=1"> & </script> “é” 👋🏽\n\n  {{ 7 * 7 }}'
SECONDS = 60
RAW = (-1.25, 0.5, 2.0, 1.0)


class Session:
    """Says NASTY, a word at a time, each let through by `gate`; rewards are RAW."""

    def __init__(self, sides=("policy", "reference"), has_rewards=True):
        self.sides = sides
        self.has_rewards = has_rewards
        self.format = "chat"
        self.gate = threading.Semaphore(1000)
        self.asked, self.laws = [], []
        self.raw = {side: RAW for side in sides}

    def answer(self, conversation, asked):
        (turn,), (num_samples, procedure, decoding) = conversation, asked
        assert turn.role == "user"
        text = turn.content
        self.asked.append((text, num_samples, procedure))
        self.laws.append((decoding.temperature, decoding.top_p))
        if not text.strip():
            raise InputError(f"The prompt is empty ({text!r}); write one.")
        if len(text) > 300:
            raise InputError(f"The prompt has {len(text)} tokens, but the context holds 300; shorten it.")
        if not 1 <= num_samples <= 9:
            raise InputError(f"{num_samples} responses are asked for; ask for 1 to 9.")
        if procedure not in ("best_of_4", "worst_of_2", ""):
            raise InputError(f"There is no procedure {procedure!r}.")
        if text == "break":
            raise RuntimeError("secret")
        words = NASTY.split(" ")
        for count in range(1, len(words) + 1):
            self.gate.acquire()
            state = "growing" if count < len(words) else "ended"
            so_far = Response(" ".join(words[:count]), state)
            cut = Response(f"cut {count}", "growing" if count < len(words) else "cut")
            yield Drawn({side: (*[so_far] * (num_samples - 1), cut) for side in self.sides})
        if self.has_rewards:
            yield Comparing(8, 3, 5)
            ranks = (0.0, 0.25, 1.0, float("nan"))[:num_samples]
            raw = {side: values[:num_samples] for side, values in self.raw.items()}
            yield Scored({side: Rewards(raw[side], ranks, raw[side]) for side in self.sides})
            yield self.pick(self.raw, procedure)

    def pick(self, rewards, procedure):
        assert {side: tuple(raw) for side, raw in rewards.items()} == self.raw
        if procedure == "best_of_4":
            return Picked("best_of_4", 4, {"policy": 2, "reference": 2})
        if procedure == "worst_of_2":
            return Picked("worst_of_2", 2, {"policy": 0, "reference": 0})
        raise InputError(f"There is no procedure {procedure!r}.")


def wait(page, expression):
    """Until the expression is true. (`page.wait_for_function` polls from within the page, whose policy forbids it.)"""
    end = time.monotonic() + SECONDS
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression} never came true: {page.inner_text('body')}"
        page.wait_for_timeout(20)


class Shown:
    """The page of a session, open in a browser."""

    def __init__(self, open_page):
        self.open_page = open_page
        self.servers = []

    def open(self, session, *, prompt="", **window):
        html = shown_page.render(
            "bon_<helpful>",
            sides=session.sides,
            trained_for=("best_of_4", "exponential(10)") if session.has_rewards else None,
            prompt=prompt,
            num_samples=4,
            procedure="best_of_4",
            temperature=0.7,
            examples=("How are you?", "<b>\u202eWhy?"),
        )
        server = Server(html, sample_page.answers(session))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.servers.append((server, thread, session))
        self.page = self.open_page(server.url, **window)
        wait(self.page, f"{FOCUS} === 'prompt'")

    def close(self):
        for server, thread, session in self.servers:
            session.gate.release(1000)
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture
def shown(open_page) -> Iterator[Shown]:
    shown = Shown(open_page)
    yield shown
    shown.close()


IDLE = "!document.querySelector('button[type=submit]').disabled"
ERROR = "document.getElementById('error').hidden ? '' : document.getElementById('error').textContent"
STATUS = "document.getElementById('status').textContent"
FOCUS = "(document.activeElement.id || document.activeElement.textContent)"


ROWS = """Array.from(document.querySelectorAll(".SIDE li"), row => [
  row.className, row.querySelector("p").textContent,
  Object.fromEntries(Array.from(row.querySelectorAll("dl div"), pair => Array.from(pair.children, c => c.textContent)))
])"""


def texts(side: str) -> str:
    return f"Array.from(document.querySelectorAll('.turn[open] .{side} li > p:last-of-type'), p => p.textContent)"


def test_a_prompt_is_answered_with_rewards_and_the_pick(shown):
    session = Session()
    shown.open(session)
    page = shown.page
    assert page.evaluate("document.querySelector('h1').textContent") == "bon_<helpful>"
    page.keyboard.insert_text("How do I")
    page.keyboard.press("Shift+Enter")
    page.keyboard.insert_text("bake <b>bread</b>?")
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && document.querySelectorAll('.picked').length === 2")
    assert session.asked == [("How do I\nbake <b>bread</b>?", 4, "best_of_4")]
    assert page.evaluate("document.querySelector('summary').textContent") == "How do I\nbake <b>bread</b>?"
    for side in session.sides:
        *ended, cut = page.evaluate(texts(side))
        assert ended == [NASTY] * 3
        assert cut.startswith("cut")
        rows = page.evaluate(ROWS.replace("SIDE", side))
        assert [row[0] for row in rows] == ["", "", "picked", ""]
        assert rows[2][1] == "▸ best_of_4 picks this"
        assert [row[2]["raw"] for row in rows] == ["−1.250", "0.500", "2.000", "1.000"]
        assert [row[2]["calibrated"] for row in rows] == ["0.000", "0.250", "1.000", "nan"]
    assert page.evaluate("document.querySelectorAll('p.cut').length") == 2
    assert page.evaluate(STATUS) == "best_of_4 picks policy 3, reference 3."
    # Nothing that was said became part of the page.
    assert page.evaluate("document.title") == "bon_<helpful>: sample"
    assert page.evaluate("document.querySelectorAll('main img, main b').length") == 0


def test_responses_stream_and_escape_stops_them(shown):
    session = Session()
    session.gate = threading.Semaphore(0)
    shown.open(session)
    page = shown.page
    page.keyboard.insert_text("Hello")
    page.keyboard.press("Enter")
    words = NASTY.split(" ")
    for count in (1, 2, 3):
        session.gate.release()
        wait(page, f"({texts('policy')})[0] === {' '.join(words[:count])!r}")
    assert page.evaluate("document.querySelectorAll('p.growing').length") == 8
    assert page.evaluate("document.getElementById('turns').getAttribute('aria-busy')") == "true"
    assert not page.evaluate(IDLE)
    page.keyboard.press("Enter")  # one at a time
    page.keyboard.press("Escape")
    wait(page, IDLE)
    assert page.evaluate(STATUS) == "Stopped."
    assert page.evaluate("document.querySelectorAll('p.growing').length") == 0
    assert page.evaluate(FOCUS) == "prompt"
    session.gate.release(1000)
    page.keyboard.insert_text("Again")  # over the selected text
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && document.querySelectorAll('.picked').length === 2")
    assert [text for text, *_ in session.asked] == ["Hello", "Again"]


def test_another_procedure_picks_among_the_same_responses(shown):
    session = Session()
    shown.open(session, prompt="Hello")
    page = shown.page
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && document.querySelectorAll('.picked').length === 2")
    page.evaluate("document.getElementById('procedure').select()")
    page.evaluate("document.getElementById('procedure').focus()")
    page.keyboard.insert_text("worst_of_2")
    page.keyboard.press("Tab")
    wait(page, "document.querySelectorAll('.policy li')[0].className === 'picked'")
    classes = page.evaluate("Array.from(document.querySelectorAll('.policy li'), li => li.className)")
    assert classes == ["picked", "", "unseen", "unseen"]
    assert page.evaluate(STATUS) == "worst_of_2, of the first 2, picks policy 1, reference 1."
    assert len(session.asked) == 1
    page.evaluate("document.getElementById('procedure').focus()")
    page.evaluate("document.getElementById('procedure').select()")
    page.keyboard.insert_text("bset_of_4")
    page.keyboard.press("Tab")
    wait(page, f"({ERROR}) === \"There is no procedure 'bset_of_4'.\"")


@pytest.mark.parametrize(
    ("prompt", "field", "value", "told"),
    [
        ("  ", None, None, "The prompt is empty ('')"),
        ("x" * 301, None, None, "The prompt has 301 tokens, but the context holds 300"),
        ("Hello", "num_samples", "0", "0 responses are asked for; ask for 1 to 9."),
        ("Hello", "num_samples", "1000", "1000 responses are asked for"),
        ("Hello", "num_samples", "-3", "-3 responses are asked for"),
        ("Hello", "num_samples", "2.5", "The number of responses is '2.5'; it is a whole number."),
        ("Hello", "num_samples", "", "The number of responses is ''"),
        ("Hello", "num_samples", "<b>", "The number of responses is '<b>'"),
        ("Hello", "procedure", "best", "There is no procedure 'best'."),
        ("Hello", "procedure", "best_of_4" + "+" * 200, "The procedure has 209 characters; the most is 200."),
        ("Hello", "temperature", "0", "The temperature is 0; it is a number from 0.01 to 100."),
        ("Hello", "temperature", "warm", "The temperature is 'warm'; it is a number"),
        ("Hello", "top_p", "1.5", "The top_p is 1.5; it is a number from 1e-06 to 1."),
        ("break", None, None, "It broke: RuntimeError."),
    ],
)
def test_bad_input_is_told_on_the_page_which_then_goes_on(shown, prompt, field, value, told):
    shown.open(Session())
    page = shown.page
    page.keyboard.insert_text(prompt)
    if field:
        page.evaluate(f"document.getElementById('{field}').value = {value!r}")
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && ({ERROR})")
    assert told in page.evaluate(ERROR)
    assert page.evaluate("document.getElementById('error').getAttribute('role')") == "alert"
    assert page.evaluate("document.querySelectorAll('.turn').length") == 0
    assert page.evaluate("document.getElementById('prompt').value") == prompt
    page.evaluate(
        "prompt.value = 'Hello', samples.value = '4', procedure.value = 'best_of_4', temperature.value = '1',"
        "topP.value = '', prompt.focus()"
    )
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && document.querySelectorAll('.picked').length === 2")
    assert page.evaluate(ERROR) == ""


def test_a_server_that_has_ended_is_told(shown, problems):
    shown.open(Session(), prompt="Hello")
    server, *_ = shown.servers[0]
    server.closing.set()  # a connection that the browser has opened in advance would still be answered
    server.shutdown()
    server.server_close()
    shown.page.keyboard.press("Enter")
    wait(shown.page, f"{IDLE} && ({ERROR})")
    assert "Start it again" in shown.page.evaluate(ERROR)
    assert all("ERR_CONNECTION_REFUSED" in problem for problem in problems)
    problems.clear()


def test_the_arrows_bring_back_earlier_prompts(shown):
    shown.open(Session())
    page = shown.page
    for index, text in enumerate(("first", "second")):
        page.keyboard.insert_text(text)
        page.keyboard.press("Enter")
        wait(page, f"{IDLE} && document.querySelectorAll('.turn').length === {index + 1}")
    assert page.evaluate("document.querySelectorAll('.turn[open]').length") == 1
    value = "prompt.value"
    page.keyboard.insert_text("draft")
    assert page.evaluate(value) == "draft"
    seen = []
    for key in ("ArrowUp", "ArrowUp", "ArrowUp", "ArrowDown", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
        seen.append(page.evaluate(value))
    assert seen == ["second", "first", "first", "second", "draft", "draft"]


def test_the_keyboard_reaches_everything_in_order(shown):
    shown.open(Session(), prompt="Hello")
    page = shown.page
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && document.querySelectorAll('.picked').length === 2")
    order = []
    for _ in range(10):
        order.append(page.evaluate(FOCUS))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", order
        page.keyboard.press("Tab")
    terms = ["raw reward", "calibrated reward", "reference"]
    fields = ["prompt", "num_samples", "procedure", "temperature", "top_p", "Send", "example"]
    assert order == [*fields, *terms]
    labels = page.evaluate("Array.from(document.querySelectorAll('textarea, input'), i => i.labels.length)")
    assert labels == [1, 1, 1, 1, 1]


def test_temperature_and_top_p_reach_the_session(shown):
    session = Session()
    shown.open(session, prompt="Hello")
    page = shown.page
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && document.querySelectorAll('.picked').length === 2")
    page.evaluate("temperature.value = '1.5', topP.value = '0.9'")
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && document.querySelectorAll('.turn[open] .picked').length === 2")
    wait(page, "document.querySelectorAll('.turn').length === 2")
    page.evaluate("temperature.value = '', topP.value = ' '")
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && document.querySelectorAll('.turn').length === 3")
    assert session.laws == [(0.7, 1.0), (1.5, 0.9), (None, None)], "an empty field leaves it to the session"


def test_examples_come_one_after_the_other(shown):
    shown.open(Session())
    page = shown.page
    seen = []
    for _ in range(3):
        page.evaluate("example.click()")
        seen.append(page.evaluate("prompt.value"))
        assert page.evaluate(FOCUS) == "prompt"
    assert seen == ["How are you?", "<b>⟦U+202E⟧Why?", "How are you?"]
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && document.querySelectorAll('.picked').length === 2")


def test_who_wins_is_said_and_counted(shown):
    session = Session()
    shown.open(session, prompt="Hello")
    page = shown.page
    verdict = "document.querySelector('.turn[open] .verdict')?.textContent"
    score = "document.getElementById('score').textContent"
    assert page.evaluate("document.getElementById('score').hidden")
    rounds = [
        ({"policy": RAW, "reference": (-3.0, 0.0, 1.5, 9.0)}, "The policy wins: 2.000 against 1.500 by raw reward."),
        ({"policy": (0.0,) * 4, "reference": RAW}, "The reference wins: 2.000 against 0.000 by raw reward."),
        ({"policy": RAW, "reference": RAW}, "A tie: both picks have 2.000 by raw reward."),
        ({"policy": (0.0, 0.0, float("nan"), 0.0), "reference": RAW}, None),
    ]
    for count, (session.raw, expected) in enumerate(rounds, start=1):
        page.keyboard.press("Enter")
        wait(page, f"{IDLE} && document.querySelectorAll('.turn').length === {count}")
        wait(page, "document.querySelectorAll('.turn[open] .picked').length === 2")
        assert page.evaluate(verdict) == expected
    assert page.evaluate(score) == "So far: policy 1, reference 1, ties 1."
    # Another procedure picks others in the latest turn alone.
    session.raw = {"policy": RAW, "reference": (-3.0, 0.0, 1.5, 9.0)}
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && ({score}) === 'So far: policy 2, reference 1, ties 1.'")
    page.evaluate("procedure.value = 'worst_of_2', procedure.dispatchEvent(new Event('change'))")
    wait(page, f"({verdict}) === 'The policy wins: −1.250 against −3.000 by raw reward.'")
    assert page.evaluate(score) == "So far: policy 2, reference 1, ties 1."


def test_what_steers_the_screen_is_visible(shown):
    shown.open(Session(), prompt="")
    shown_text = shown.page.evaluate(r"visible('a\u202eb\u001b[2J\ud83d c\r\n\t👋🏽')")
    assert shown_text == "a⟦U+202E⟧b⟦U+001B⟧[2J⟦U+D83D⟧ c\n\t👋🏽"


GOOD = {"policy": [1.0, 2.0], "reference": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("name", "request_", "told"),
    [
        ("pick", {"procedure": "best_of_2"}, "The rewards are None"),
        ("pick", {"rewards": [1], "procedure": "best_of_2"}, "The rewards are [1]"),
        ("pick", {"rewards": {}, "procedure": "best_of_2"}, "a list of numbers for each of policy, reference"),
        ("pick", {"rewards": {**GOOD, "<b>": [1.0]}, "procedure": "best_of_2"}, "The rewards are {"),
        ("pick", {"rewards": {**GOOD, "policy": 1}, "procedure": "best_of_2"}, "The rewards of the policy are 1"),
        ("pick", {"rewards": {**GOOD, "policy": []}, "procedure": "best_of_2"}, "a list of 1 to 256 numbers"),
        ("pick", {"rewards": {**GOOD, "policy": [0.0] * 300}, "procedure": "best_of_2"}, "a list of 1 to 256 numbers"),
        ("pick", {"rewards": {**GOOD, "policy": [1.0]}, "procedure": "best_of_2"}, "unequal numbers"),
        ("pick", {"rewards": {**GOOD, "policy": [1.0, "nan"]}, "procedure": "best_of_2"}, "policy is 'nan'"),
        ("pick", {"rewards": {**GOOD, "policy": [1.0, None]}, "procedure": "best_of_2"}, "policy is None"),
        ("pick", {"rewards": {**GOOD, "policy": [1.0, True]}, "procedure": "best_of_2"}, "policy is True"),
        ("pick", {"rewards": {**GOOD, "policy": [1.0, 10**400]}, "procedure": "best_of_2"}, "policy is 1000"),
        ("pick", {"rewards": {**GOOD, "policy": [1.0, float("inf")]}, "procedure": "best_of_2"}, "is inf"),
        ("pick", {"rewards": GOOD}, "The procedure is None"),
        ("pick", {"rewards": GOOD, "procedure": 7}, "The procedure is 7"),
        ("pick", {"rewards": GOOD, "procedure": "+" * 80_000}, "The procedure has 80000 characters"),
        ("pick", {"rewards": GOOD, "procedure": "best_of_2", "more": 1}, "The request has the fields ['more']"),
        ("respond", {}, "The number of responses is None"),
        ("respond", {"num_samples": True}, "The number of responses is True"),
        ("respond", {"num_samples": 2, "procedure": "sampling"}, "The prompt is None"),
        ("respond", {"num_samples": 2, "procedure": "sampling", "prompt": "x" * 200_000}, "has 200000 characters"),
        ("respond", {"num_samples": 2, "procedure": "sampling", "prompt": "a\ud83d"}, "half a character ('\\ud83d'"),
        ("respond", {"num_samples": 2, "procedure": "s", "prompt": "a", "temperature": "1"}, "The temperature is '1'"),
        ("respond", {"num_samples": 2, "procedure": "s", "prompt": "a", "temperature": float("nan")}, "is nan"),
        ("respond", {"num_samples": 2, "procedure": "s", "prompt": "a", "top_p": 0}, "The top_p is 0"),
        ("respond", {"num_samples": 2, "procedure": "s", "prompt": ["a"] * 999}, " …; it is a text"),
    ],
)  # fmt: skip
def test_every_field_of_a_request_is_checked(name, request_, told):
    with pytest.raises(InputError) as caught:
        list(sample_page.answers(Session())[name](request_))
    assert told in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_model_alone_has_one_column_and_no_procedure(shown):
    shown.open(Session(sides=("model",), has_rewards=False), prompt="Hello")
    page = shown.page
    assert page.evaluate("document.getElementById('procedure')") is None
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && ({STATUS}) === 'Done.'")
    assert page.evaluate(texts("model"))[:3] == [NASTY] * 3
    assert page.evaluate("document.querySelectorAll('dl, .picked').length") == 0


@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1100, False), (1100, True)])
def test_it_fits_a_phone_and_follows_light_and_dark(shown, tmp_path, width, dark):
    session = Session()
    shown.open(session, prompt="Hello", width=width, height=800, dark=dark)
    page = shown.page
    page.keyboard.press("Enter")
    wait(page, f"{IDLE} && document.querySelectorAll('.picked').length === 2")
    assert page.evaluate("innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    lefts = page.evaluate("Array.from(document.querySelectorAll('.answers section'), s => s.getBoundingClientRect().x)")
    assert len(set(lefts)) == (1 if width == 360 else 2)
    # WCAG 2.1, 1.4.3: text of the page against what it stands on.
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 20
    assert min(contrast for contrast, _ in contrasts) >= 4.5, min(contrasts)
    ink = page.evaluate("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)[0]")
    assert (ink > 180) == dark


CONTRASTS = """(() => {
  const light = color => {
    const [r, g, b] = color.map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const parts = color => color.match(/[\\d.]+/g).map(Number);
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    if (!Array.from(node.childNodes).some(c => c.nodeType === 3 && c.textContent.trim())) continue;
    if (!node.getClientRects().length || node.matches(":disabled")) continue;
    let behind = node;
    while ((parts(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const pair = [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor].map(c => light(parts(c)));
    found.push([(Math.max(...pair) + .05) / (Math.min(...pair) + .05), node.outerHTML.slice(0, 80)]);
  }
  return found;
})()"""
