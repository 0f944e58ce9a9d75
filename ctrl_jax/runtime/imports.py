"""What a Python module's results depend on, as far as its source shows: the modules that it imports, and theirs."""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path


def sources(module: str, folder: Path) -> dict[str, str]:
    """By name, what is known of `module` and of every module that it imports, directly or through another.

    A file of one's own is known by a hash of its contents, and what it imports is looked through as well, at its top or
    within its functions; an installed package is known by its version; one that is not there is `absent`. The standard
    library is left out. What is imported by a name that is computed, and what is read at run time, is not seen.

    Args:
      folder: where modules are looked for first, as `python -c` does in the current folder.
    """
    found: dict[str, str] = {}
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()  # a file may have been written since the last look
        waiting = [(module, True)]
        seen = set[str]()
        while waiting:
            name, certain = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            known, imported = _known(name, certain=certain)
            if known is not None:
                found[known[0]] = known[1]
            waiting += imported
    finally:
        sys.path.remove(str(folder))
    return dict(sorted(found.items()))


def _known(name: str, *, certain: bool) -> tuple[tuple[str, str] | None, list[tuple[str, bool]]]:
    """What a module is known by, and the names that it imports; of a name that is not `certain` to be one, perhaps
    nothing."""
    top = name.partition(".")[0]
    spec = _spec(top)
    if spec is not None and _is_below(spec, _installed()):
        versions = [f"{one} {importlib.metadata.version(one)}" for one in sorted(_distributions().get(top, []))]
        if versions:
            return (top, ", ".join(versions)), []
    elif spec is not None and (spec.origin in ("built-in", "frozen") or _is_below(spec, _library())):
        return None, []
    spec = spec if name == top else _spec(name)
    if spec is None:
        return ((name, "absent") if certain else None), []
    parents = [(name.rpartition(".")[0], True)] if "." in name else []
    if spec.origin is None or not Path(spec.origin).is_file():
        return None, parents  # a folder without __init__.py: its modules are named where they are imported
    contents = Path(spec.origin).read_bytes()
    imported = _imported(contents, spec) if spec.origin.endswith(".py") else ()
    return (name, hashlib.sha256(contents).hexdigest()[:16]), [*parents, *imported]


def _imported(source: bytes, spec: ModuleSpec) -> Iterator[tuple[str, bool]]:
    """The names that a module imports, anywhere in it, and whether each is certain to be a module's."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((alias.name, True) for alias in node.names)
            case ast.ImportFrom():
                try:
                    base = importlib.util.resolve_name("." * node.level + (node.module or ""), spec.parent)
                except ImportError:
                    continue
                yield base, True
                yield from ((f"{base}.{alias.name}", False) for alias in node.names if alias.name != "*")
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(str(name)), *_]):
                if called in ("import_module", "__import__") and not name.startswith("."):
                    yield name, True


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except Exception:  # it imports the packages above, which may raise anything
        return None


def _is_below(spec: ModuleSpec, folders: tuple[Path, ...]) -> bool:
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return bool(places) and any(Path(places[0]).resolve().is_relative_to(folder) for folder in folders)


@functools.cache
def _installed() -> tuple[Path, ...]:
    paths = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages())
    return tuple(Path(path).resolve() for path in (*paths, site.getusersitepackages()))


@functools.cache
def _library() -> tuple[Path, ...]:
    return tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return {name: sorted(set(found)) for name, found in importlib.metadata.packages_distributions().items()}
