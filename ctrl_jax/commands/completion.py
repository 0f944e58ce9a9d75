"""What a shell completes behind `ctrl-jax`: jobs, experiments and runs, and options."""

from collections.abc import Iterable

SCRIPT = """\
# eval "$(ctrl-jax --completion)"    in bash or zsh
[ -z "$ZSH_VERSION" ] || { autoload -U +X bashcompinit && bashcompinit; }
_ctrl_jax() {
    local word=${COMP_WORDS[COMP_CWORD]} own
    case $COMP_CWORD in
        1) COMPREPLY=($(compgen -W "JOBS" -- "$word")) ;;
        2) own=$(cd experiments 2>/dev/null && ls *.py | sed 's/\\.py$//')
           COMPREPLY=($(compgen -W "EXPERIMENTS $own" -- "$word") $(compgen -f -- "$word")) ;;
        *) case $word in
            -*) COMPREPLY=($(compgen -W "OPTIONS" -- "$word")) ;;
            *) COMPREPLY=($(compgen -f -- "$word")) ;;
        esac ;;
    esac
}
complete -o filenames -F _ctrl_jax ctrl-jax"""


def script(jobs: Iterable[str]) -> str:
    """For bash, and for zsh by its bashcompinit: jobs, experiments that are here or shipped, runs, and the options of
    experiments; those of single commands and algorithms are in their --help."""
    from ctrl_jax.commands import flags
    from ctrl_jax.commands.experiments import names

    known = flags.options()
    leaves = (name for name in known if not any(other.startswith(f"{name}.") for other in known))
    options = sorted(f"--{name.replace('_', '-')}" for name in leaves)
    words = {"JOBS": jobs, "EXPERIMENTS": names(), "OPTIONS": options}
    found = SCRIPT
    for place, those in words.items():
        found = found.replace(f'"{place}', f'"{" ".join(those)}')
    return found
