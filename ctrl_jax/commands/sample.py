"""A prompt of yours to the policy and the reference, on a local page or in the terminal."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from ctrl_jax.commands.options import Options as RunOptions
from ctrl_jax.commands.options import read
from ctrl_jax.config import Decoding
from ctrl_jax.errors import InputError

if TYPE_CHECKING:
    from ctrl_jax.pipeline.workspace import Workspace


@dataclass(frozen=True)
class Options(RunOptions):
    prompt: str | None = None
    """What the human says; in the terminal by default the first test prompt."""
    num_samples: int | None = None
    """Responses of each policy; by default 4, or as many as the procedure looks at."""
    procedure: str | None = None
    """What picks one of them; by default what the policy is trained for."""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = field(default_factory=Decoding)
    untrained: bool = False
    """Ask the model at --model.path as it is, without rewards; nothing is trained."""
    terminal: bool = False
    """Print a table instead of opening a page."""
    browser: bool = True
    """Open the page in a browser, where there is a display."""
    port: int = 0
    """Of the page, on 127.0.0.1; 0 is a free one."""

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise InputError(f"num_samples is {self.num_samples}; ask for at least 1 response.")

    @property
    def needs_stages(self) -> bool:
        return not self.untrained


def main(arguments: list[str]) -> int:
    asked = read("sample", Options, arguments)
    from ctrl_jax.commands.launch import started

    with started(asked) as workspace:
        answer(workspace, asked.options)
    return 0


def answer(workspace: "Workspace", options: Options) -> None:
    """Answers the prompt in the terminal, or serves the page until Ctrl-C."""
    from ctrl_jax.commands import sample_page, sample_session, summary
    from ctrl_jax.pipeline.run import prepare
    from ctrl_jax.runtime import hosts

    if hosts.several():
        raise InputError("`sample` answers on one host; start it there alone. A finished run is read from --runs-dir.")
    asked = sample_session.ask_for(
        workspace.experiment.policy, options.num_samples, options.procedure, rewards=not options.untrained
    )
    if options.untrained:
        session = sample_session.untrained(workspace, options.decoding)
        run = None
    else:
        with workspace.claimed():
            run = prepare(workspace)
            session = sample_session.trained(run, options.decoding, options.prompt)
        summary.print_address(workspace)
    if options.terminal:
        if options.prompt is None:
            said = sample_session.first(run or prepare(workspace))
        else:
            said = sample_session.said(options.prompt, session.format)
        sample_session.print_responses(session, said, asked)
    else:
        sample_page.serve(
            session, workspace.experiment, options.prompt or "", asked, port=options.port, browser=options.browser
        )
