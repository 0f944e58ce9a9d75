"""Who may import whom: the layout table of the design, held by reading the sources."""

import ast
import graphlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ctrl_jax"

# Rows in order: a module imports from rooms above its own, and of those only these. It may always import its own room.
BASICS = {"errors", "types"}
PURE = BASICS | {"theory", "steps"}
LIBRARY = PURE | {"algorithms", "config", "models", "data", "runtime", "devices"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "theory": {"errors"},
    "steps": BASICS | {"theory"},
    "checked_json": BASICS,
    "evaluation": BASICS | {"theory", "checked_json"},
    "algorithms": PURE,
    "decoding": PURE,
    "models": BASICS,
    "data": BASICS,
    "runtime": BASICS,
    # The mesh asks the hosts where a batch's rows are.
    "devices": BASICS | {"steps", "models", "runtime"},
    # The options of adapters and the names of a row's fields belong to the rooms that use them.
    "config": BASICS | {"theory", "steps", "models", "data"},
    "report": PURE | {"checked_json", "evaluation"},
    "rewards": LIBRARY - {"algorithms", "theory"},
    "pipeline": LIBRARY | {"decoding", "rewards", "evaluation"},
    "planning": LIBRARY - {"algorithms", "data", "theory"} | {"rewards", "pipeline"},
    "commands": LIBRARY - {"algorithms"} | {"decoding", "rewards", "report", "pipeline", "planning", "evaluation"},
    # Behind the names of `ctrl_jax/__init__.py`.
    "library": LIBRARY | {"rewards", "report", "pipeline", "commands", "evaluation"},
    "__main__": {"errors", "runtime", "commands"},
}
# Of a room that a row names, these modules alone.
ONLY = {"devices": {"steps": {"masked"}}, "config": {"steps": {"combination", "ensemble"}}}
PURE_PYTHON = {
    "abc",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "itertools",
    "math",
    "operator",
    "re",
    "types",
    "typing",
}
# Rooms that import nothing else from outside the package.
MAY_IMPORT_FROM_OUTSIDE = {
    "errors": PURE_PYTHON,
    "types": PURE_PYTHON | {"jax"},
    "theory": PURE_PYTHON | {"contextlib", "difflib", "hashlib", "inspect", "jax", "numpy", "scipy"},
    "steps": PURE_PYTHON | {"chex", "jax", "numpy", "scipy"},
    "decoding": PURE_PYTHON | {"chex", "jax", "numpy"},
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
EXPERIMENTS = sorted([*(ROOT / "experiments").glob("*.py"), *(ROOT / "experiments" / "rivals").glob("*.py")])
REWARDS = sorted((ROOT / "experiments" / "rewards").glob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[str]:
    """Dotted names of all that is imported, anywhere in the file: `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def identifiers(source: str) -> Iterator[str]:
    """Names that the code uses; not what its docstrings say."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield from node.name.split(".")


def breaches(room_name: str, source: str) -> list[str]:
    found = []
    for imported in imports(source):
        first, *rest = imported.split(".")
        if first == "ctrl_jax":
            target = rest[0] if rest else ""
            only = ONLY.get(room_name, {}).get(target)
            whole = target == room_name or target in MAY_IMPORT[room_name]
            if not whole or (only is not None and not set(rest[1:2]) <= only):
                found.append(imported)
        elif first not in MAY_IMPORT_FROM_OUTSIDE.get(room_name, {first}):
            found.append(imported)
    return found


def test_a_row_names_rows_above_it():
    above: set[str] = set()
    for row, named in MAY_IMPORT.items():
        assert named <= above, row
        above.add(row)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=name)
def test_a_module_imports_only_what_its_row_names(path):
    assert room(path) in MAY_IMPORT, f"{name(path)} is in no row of the layout table: give it one"
    assert breaches(room(path), path.read_text()) == []


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_an_experiment_is_made_of_config_alone(path):
    inside = [imported for imported in imports(path.read_text()) if imported.split(".")[0] not in PURE_PYTHON]
    assert all(imported.startswith(("ctrl_jax.config", "experiments.")) for imported in inside), inside


IMPURE = {"jit", "pmap", "shard_map", "print", "open", "callback", "io_callback", "pure_callback", "debug"}


@pytest.mark.parametrize("path", [path for path in SOURCES if room(path) in ("steps", "decoding")], ids=name)
def test_steps_are_pure(path):
    assert IMPURE.isdisjoint(identifiers(path.read_text()))


@pytest.mark.parametrize("path", sorted((PACKAGE / "algorithms").glob("*.py")), ids=name)
def test_algorithms_are_pure(path):
    assert IMPURE.isdisjoint(identifiers(path.read_text()))


@pytest.mark.parametrize("path", [path for path in SOURCES if room(path) not in ("devices", "theory")], ids=name)
def test_only_devices_compile_and_map(path):
    # theory/ may compile its own solvers, which no step calls.
    assert {"jit", "pmap", "shard_map"}.isdisjoint(identifiers(path.read_text()))


@pytest.mark.parametrize("path", [path for path in SOURCES if name(path) != "ctrl_jax/runtime/metrics.py"], ids=name)
def test_durations_are_not_told_by_a_clock_that_jumps(path):
    # metrics.py stamps TensorBoard's points with the time of day.
    assert not re.search(r"\btime\.time\(|\bdatetime\.now\(|from time import", path.read_text())


@pytest.mark.parametrize("path", REWARDS, ids=name)
def test_a_reward_of_the_experiments_has_no_code_of_ctrl_jax_in_its_key(path):
    assert not [imported for imported in imports(path.read_text()) if imported.startswith("ctrl_jax")]


@pytest.mark.parametrize("path", SOURCES + EXPERIMENTS + REWARDS, ids=name)
def test_python_3_11_can_read_it(path):
    ast.parse(path.read_text(), feature_version=(3, 11))


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/**/__init__.py")), ids=name)
def test_packages_export_nothing(path):
    """But for the whole's, which test_library.py holds."""
    body = ast.parse(path.read_text()).body
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def test_importing_touches_no_device():
    modules = [
        name(path).removesuffix(".py").replace("/", ".")
        for path in SOURCES
        if path.stem not in ("__init__", "__main__")
    ]
    program = f"""
import importlib
for module in {modules}:
    importlib.import_module(module)
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized(), module
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("room_name", "source", "expected"),
    [
        ("steps", "import flax", ["flax"]),
        ("steps", "from ctrl_jax.config import Policy", ["ctrl_jax.config.Policy"]),
        ("steps", "def f():\n    import time", ["time"]),
        ("steps", "from ctrl_jax.devices import programs", ["ctrl_jax.devices.programs"]),
        ("devices", "from ctrl_jax.steps import kl", ["ctrl_jax.steps.kl"]),
        ("devices", "from ctrl_jax.steps.masked import Mean", []),
        ("algorithms", "from ctrl_jax.models import lora", ["ctrl_jax.models.lora"]),
        ("steps", "from ctrl_jax.theory import ideal\nfrom ctrl_jax.steps import kl\nimport jax.numpy as jnp", []),
        ("theory", "from ctrl_jax.types import Transform", ["ctrl_jax.types.Transform"]),
        ("models", "import flax\nfrom ctrl_jax.steps import kl", ["ctrl_jax.steps.kl"]),
        ("config", "import ctrl_jax.pipeline.train", ["ctrl_jax.pipeline.train"]),
        ("pipeline", "from ctrl_jax import devices, theory", []),
    ],
)
def test_this_test_can_fail(room_name, source, expected):
    assert breaches(room_name, source) == expected


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, with the first again at the end; none for no circle."""
    graph = {
        importer: {
            next((name for name in (imported, imported.rpartition(".")[0]) if name in sources), importer)
            for imported in imports(source)
        }
        - {importer}
        for importer, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


# To become empty: modules that still import, within a function, what imports them.
IN_CIRCLES: set[str] = set()


def test_no_modules_import_each_other():
    sources = {module(path): path.read_text(encoding="utf-8") for path in SOURCES}
    assert import_circle({name: source for name, source in sources.items() if name not in IN_CIRCLES}) == []


def test_the_test_of_import_circles_can_fail():
    sources = {
        "p.a": "from p import b",
        "p.b": "def f():\n    from p.c import x",
        "p.c": "import p.a",
        "p.d": "import p.a",
    }
    assert set(import_circle(sources)) == {"p.a", "p.b", "p.c"}
    assert import_circle({**sources, "p.c": "import json"}) == []


MOST_LINES = 60
# To become empty: functions that are still too long.
TOO_LONG: set[str] = set()


def long_functions(source: str) -> list[str]:
    """Functions of more than MOST_LINES lines without their docstring."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            if node.end_lineno - node.lineno + 1 - docstring > MOST_LINES:
                found.append(node.name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_function_is_long(path):
    found = {f"{path.name}:{function}" for function in long_functions(path.read_text(encoding="utf-8"))}
    assert found <= TOO_LONG


@pytest.mark.parametrize(("lines", "found"), [(MOST_LINES - 1, []), (MOST_LINES, ["f"])])
def test_the_test_of_long_functions_can_fail(lines, found):
    docstring = '    """a\n    b\n    """\n'
    assert long_functions("def f():\n" + docstring + "    x = 1\n" * lines) == found


# Words of which a native reader stumbles over, and what to write.
WORDS = {
    r"(tell|tells|told)\b(?![^.]{0,40}\bapart)": "say, report, show, know, distinguish",
    r"shall": "should, must, will",
    r"lies?\b(?! (in|between|within|above|below|near|too near)\b)": "is, is stored, is placed, is sharded",
    r"what (is there )?of (it|them|what|its)\b": "the stages that, those that",
}
# Written by people who are quoted: the phrases of the dialogues.
QUOTED = {"ctrl_jax/data/phrases.py"}


def stumbles(source: str) -> list[str]:
    """Lines of comments, docstrings and messages with a word of WORDS."""
    texts = (
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None))
    )
    pattern = re.compile(r"\b(" + "|".join(WORDS) + r")", re.IGNORECASE)
    return [f"line {token.start[0]}: {match[0]}" for token in texts for match in pattern.finditer(token.string)]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_its_words_are_plain(path):
    if name(path) not in QUOTED:
        assert stumbles(path.read_text(encoding="utf-8")) == [], f"say instead: {WORDS}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("# It tells what went wrong.", True),
        ("# Nobody can tell them apart.", False),
        ("f'nothing is told of {x}'", True),
        ("file.tell()", False),
        ("'the array lies on the host'", True),
        ("'it lies in [0, 1]'", False),
        ('"""What of it is missing."""', True),
        ("# It shall stay.", True),
    ],
)
def test_the_test_of_words_can_fail(source, found):
    assert bool(stumbles(source)) == found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_printed_as_markup(path):
    # `say` and `table` print text as it is, in a style where one is given: "[yellow]" would be shown.
    source = path.read_text(encoding="utf-8")
    assert "rich.markup" not in source and not re.search(r"""["']\[/?(bold|red|green|yellow|dim|cyan)""", source)


# The command line itself speaks of its options.
SPELL_FLAGS = {"commands", "__main__"}
# Options of other programs, and not of ours.
OF_OTHERS = {"--porcelain", "--logdir", "--xla_force_host_platform_device_count"}


def flags(source: str) -> list[str]:
    """Flags in the strings of a module, docstrings left out: `--policy.kl-budget`."""
    tree = ast.parse(source)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone
    ]
    return [flag for text in texts for flag in re.findall(r"--[a-z][\w.-]*", text) if flag not in OF_OTHERS]


@pytest.mark.parametrize("path", [path for path in SOURCES if room(path) not in SPELL_FLAGS], ids=name)
def test_only_the_command_line_speaks_of_flags(path):
    assert flags(path.read_text(encoding="utf-8")) == [], "name the field: commands/flags.py spells it"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise InputError(f'Lower --policy.kl-budget {x}')", ["--policy.kl-budget"]),
        ("option = '--fsdp'", ["--fsdp"]),
        ("'Of --policy.kl-budget.'", []),
        ("say('a -- b, `policy.kl_budget`')", []),
    ],
)
def test_the_test_of_flags_can_fail(source, found):
    assert flags(source) == found


# Rooms that know no command line: a program that calls them shows or mends by the parts of an error.
IN_PARTS = {
    "theory", "steps", "algorithms", "decoding", "models", "data", "devices", "config", "rewards", "planning",
    "library",
}  # fmt: skip


def without_parts(source: str) -> list[str]:
    """The InputErrors that are raised without field, value or remedy."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    errors = [call for call in calls if getattr(call.func, "id", getattr(call.func, "attr", "")) == "InputError"]
    missing = ((call.lineno, {"field", "value", "remedy"} - {part.arg for part in call.keywords}) for call in errors)
    return [f"line {line}: {', '.join(sorted(parts))}" for line, parts in missing if parts]


@pytest.mark.parametrize("path", [path for path in SOURCES if room(path) in IN_PARTS], ids=name)
def test_bad_input_has_field_value_and_remedy(path):
    assert without_parts(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise InputError('bad', field='x', value=1, remedy='mend it.')", []),
        ("raise errors.InputError('bad. Mend it.')", ["line 1: field, remedy, value"]),
        ("def f():\n    return InputError('bad', field='x', value=None)", ["line 2: remedy"]),
        ("raise ValueError('ours')", []),
    ],
)
def test_the_test_of_parts_can_fail(source, found):
    assert without_parts(source) == found


def without_encoding(source: str) -> Iterator[int]:
    """Lines that read or write text in whatever encoding the terminal has: files are UTF-8 in any locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        constants = [value.value for value in node.args if isinstance(value, ast.Constant)]
        mode = next((value for value in constants if re.fullmatch("[rwax][bt+]*", str(value))), None)
        text = {
            "read_text": not node.args,
            "write_text": len(node.args) == 1,
            "open": "b" not in mode if mode else not node.args and not node.keywords,
        }
        if (text.get(called) or given & {"text", "universal_newlines"}) and "encoding" not in given:
            yield node.lineno


@pytest.mark.parametrize("path", SOURCES + sorted((ROOT / "benchmarks").rglob("*.py")), ids=name)
def test_text_has_an_encoding_of_its_own(path):
    assert list(without_encoding(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", True),
        ("path.write_text('x')", True),
        ("path.open()", True),
        ("path.open('a')", True),
        ("open(path, 'w')", True),
        ("gzip.open(path, 'rt')", True),
        ("run(command, text=True)", True),
        ("path.open('rb')", False),
        ("path.open('w', encoding='utf-8')", False),
        ("gzip.open(path)", False),
        ("os.open(path, os.O_RDONLY)", False),
    ],
)
def test_the_test_of_encodings_can_fail(source, found):
    assert bool(list(without_encoding(source))) == found
