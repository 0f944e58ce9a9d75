"""Chat templates that try to take a machine's time or memory (EXCESSIVE), or fail in ways of their own (ODD)."""

HEAD = "{% for m in messages %}{{ m.content }};{% endfor %}"
"""What an ordinary template does; the attack stands behind it."""

BIG = ("10**9", "10**30")
SMALL_RANGE = "range(99999)"
_TEXT = "messages[0].content"


def _nested(depth: int, body: str) -> str:
    opening = "".join(f"{{% for i{k} in {SMALL_RANGE} %}}" for k in range(depth))
    return opening + body + "{% endfor %}" * depth


def _repeated(start: str, step: str) -> str:
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range(99) %}}{{% set ns.x = {step} %}}{{% endfor %}}"


TIME = {
    **{f"loops {depth} deep": _nested(depth, "") for depth in (2, 3, 8, 19)},
    **{f"loops {depth} deep that write": _nested(depth, "x") for depth in (2, 3)},
    **{
        f"loops over slices {k}": _nested(1, f"{{% for j in ({_TEXT} * 999999)[:{k}] %}}{{% endfor %}}")
        for k in (10**5,)
    },
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a power of a loop's": _repeated("7", "ns.x * ns.x"),
    "a division of large numbers": "{{ (10 ** 2000000 // 7 ** 1000000) > 1 }}",
    "a large number's digits": "{{ (10 ** 3000000) | string }}",
    "a shift by powers": "{{ 2 ** (2 ** 40) }}",
    "a doubling text": _repeated("'ab'", "ns.x + ns.x"),
    "a doubling list": _repeated("[1]", "ns.x + ns.x"),
    "a doubling set of filters": "{{ 'a'" + " | replace('a', 'aaaaaaaaaa')" * 30 + " }}",
    "a sum over ranges": "{{ (range(99999) | list * 9999) | sum }}",
    "a join over ranges": "{{ (range(99999) | list * 99999) | join }}",
    "a sort of a long list": "{{ (range(99999) | list * 999) | sort | length }}",
    "unique values of a long list": "{{ (range(99999) | list * 999) | unique | list | length }}",
    "a group of a long list": "{{ (range(99999) | list * 999) | groupby('real') | list | length }}",
    "a slice of many": "{{ range(99999) | slice(10**9) | list }}",
    "a batch of many": "{{ range(9) | batch(10**9, 'x') | list }}",
    "the content of a cycle": "{% set c = cycler('a') %}" + _nested(2, "{{ c.next() }}"),
    "lorem ipsum": "{{ lipsum(n=10**9) }}",
    "lorem ipsum of long paragraphs": "{{ lipsum(n=1, min=10**8, max=10**8 + 1) }}",
    "words wrapped": "{{ ('a ' * 10**8) | wordwrap(1) }}",
    "words counted": "{{ ('a ' * 10**8) | wordcount }}",
    "tags stripped": "{{ ('<' * 10**7) | striptags }}",
    "links found": "{{ ('www.' * 10**6) | urlize }}",
    "a title": "{{ ('a-' * 10**8) | title }}",
    "a random choice of many": "{{ (range(99999) | list * 99999) | random }}",
}
SIZE = {
    **{
        f"a width of {n}": "{{ '%" + n + "d' % 1 }}"
        for n in ("100000000", "1000000000", "2147483647", "99999999999999")
    },
    **{f"a precision of {n}": "{{ '%." + n + "f' % 1.5 }}" for n in ("100000000", "1000000000", "99999999999999")},
    "a width that is given": "{{ '%*d' % (10**9, 1) }}",
    **{
        f"a format width of {n}": "{{ '{:>" + n + "}'.format(1) }}"
        for n in ("100000000", "999999999", "99999999999999")
    },
    "a format width within": "{{ '{:>{}}'.format(1, 10**9) }}",
    "a format_map": "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
    **{f"a format filter of {n}": "{{ '%" + n + "s' | format('a') }}" for n in ("100000000", "999999999")},
    **{f"a text times {n}": f"{{{{ 'x' * ({n}) }}}}" for n in BIG},
    **{f"a list times {n}": f"{{{{ [0] * ({n}) }}}}" for n in BIG},
    **{f"a range of {n}": f"{{{{ range({n}) | list }}}}" for n in BIG},
    **{f"centred at {n}": f"{{{{ 'x' | center({n}) }}}}" for n in BIG},
    **{f"indented by {n}": f"{{{{ 'x\\ny' | indent({n}) }}}}" for n in BIG},
    **{f"JSON indented by {n}": f"{{{{ messages | tojson(indent={n}) }}}}" for n in BIG},
    **{
        f"{method} to {n}": f"{{{{ 'x'.{method}({n}) }}}}"
        for method in ("center", "ljust", "rjust", "zfill")
        for n in BIG
    },
    "tabs expanded": "{{ '\t'.expandtabs(10**9) }}",
    "many replaced": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "many joined": "{{ ('x' * 10**6).join(['a'] * 10**6) }}",
    "many translated": "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) }}",
    "bytes": "{{ 10**9 | string | list }}{{ (1).to_bytes(10**9, 'big') }}",
    "a whole page written": "{{ messages[0].content * 10**8 }}",
    "a file size": "{{ (10**300) | filesizeformat }}{{ 10**400 | filesizeformat }}",
    "a date of many": "{{ strftime_now('%c' * 10**8) }}",
    "an escape": "{{ ('<' * 10**8) | escape | forceescape }}",
    "a table of characters": "{{ 'x' | xmlattr }}{{ {'a': 'b' * 10**9} | xmlattr }}",
    "a url": "{{ ('é' * 10**8) | urlencode }}",
    "a number rounded": "{{ 1.5 | round(10**9) }}{{ 1.5 | round(-10**9, 'ceil') }}",
    "many dictionaries": "{{ [{}] * 10**9 }}",
    "pretty printed": "{{ (range(99999) | list * 999) | pprint }}",
}
ODD = {
    "a wide date": "{{ strftime_now('%999999999d') }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion of two": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion through a caller": "{% macro f() %}{{ caller() }}{% endmacro %}"
    "{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a list within itself": "{% set a = [] %}{% set _ = a.append(a) %}{{ a }}",
    "a fan of recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    **{
        f"{depth} {name} deep": opening * depth + inner + closing * depth
        for depth in (50, 500, 100_000)
        for name, opening, inner, closing in (
            ("parentheses", "{{ " + "", "1", " }}"),
            ("ifs", "{% if 1 %}", "", "{% endif %}"),
        )
    },
    **{
        f"an expression of {depth} {name}": "{{ " + opening * depth + "1" + closing * depth + " }}"
        for depth in (50, 500, 100_000)
        for name, opening, closing in (
            ("parentheses", "(", ")"),
            ("lists", "[", "]"),
            ("minus signs", "-", ""),
            ("nots", "not ", ""),
            ("sums", "1 + ", ""),
            ("joins", "1 ~ ", ""),
            ("filters", "", " | string"),
            ("attributes", "", ".real"),
        )
    },
    **{f"{depth} loops deep": "{% for a in [1] %}" * depth + "{% endfor %}" * depth for depth in (19, 25, 200)},
    "a division by zero": "{{ 1 // 0 }}",
    "a number that overflows": "{{ 1e308 * 10 }}{{ (10**400) / 3 }}",
    "a lone surrogate": "{{ '\\ud800' }}",
    "a lone surrogate of a code": "{{ '%c' % 55296 }}",
    "a lone surrogate encoded": "{{ '%c' % 55296 }}{{ ('%c' % 55296).encode() }}",
    "a character beyond all": "{{ '%c' % 99999999 }}",
    "an unknown filter": "{{ 1 | nothing }}",
    "an unknown test": "{{ 1 is nothing }}",
    "an include": "{% include 'x' %}",
    "an import": "{% import 'x' as y %}",
    "a base": "{% extends 'x' %}",
    "a format by name": "{{ '{a}'.format() }}",
    "a format of an attribute": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "a filter of the wrong type": "{{ 1 | join('x') | tojson(indent='y') }}",
    "what JSON cannot write": "{{ self | tojson }}",
    "what is raised": "{{ raise_exception(messages) }}",
    "what is raised at length": "{{ raise_exception('x' * 10**6) }}",
    "what is raised without words": "{{ raise_exception('') }}",
    "a null in the source": "{{ '\0' }}",
    "a sleep by map": "{{ [1] | map('center', 10**9) | list }}",
    "a function called by map": "{{ [''] | map(attribute='__class__') | list }}",
    "a key error": "{{ {}['x']['y'] }}",
    "an assertion": "{{ namespace(1) }}",
    "a stop": "{{ cycler() }}",
    "a key of itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns.x.x.x }}",
    "a unicode name": "{{ '\\N{nothing}' }}",
    "an escape that is cut": "{{ '\\x' }}",
    "an assignment to a loop": "{% for loop in [1] %}{{ loop.index }}{% endfor %}",
    "a block twice": "{% block a %}{% endblock %}{% block a %}{% endblock %}",
    "a block of itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "a debug of everything": "{{ self }}{{ self._TemplateReference__context }}",
}
EXCESSIVE = {**TIME, **SIZE}
