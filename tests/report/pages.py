"""What tests of pages read in them."""

import html.parser
import re


class Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "poster", "data")
        ]


def links(text: str) -> Links:
    parser = Links()
    parser.feed(text)
    return parser


def visible(text: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<(style|svg|title).*?</\1>", "", text, flags=re.DOTALL)).split())
