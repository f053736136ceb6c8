"""The part about what the models write: the same prompt, answered by each stage. All of it is untrusted text."""

from __future__ import annotations

from dataclasses import dataclass, field

from prism_nemo.report.formatting import NOT_MEASURED, clean, significant
from prism_nemo.report.read import mapping, number, objects, words
from prism_nemo.report.story import Story
from prism_nemo.report.summary import COMMAND

# The page stays under 2 MB whatever the run recorded.
MOST_PROMPTS = 24
LONGEST = 1500


@dataclass(frozen=True)
class Answer:
    """What one stage wrote, and its score: `yes` for full reward, `no` for none, `unknown` between them or absent."""

    stage: str
    css: str
    response: str
    reward: str
    state: str


@dataclass
class Prompt:
    """One prompt with the expected answer and what each stage wrote."""

    task: str
    prompt: str
    answer: str
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True)
class Samples:
    """The prompts that are shown, and how many there were."""

    prompts: list[Prompt]
    recorded: int


def collect(story: Story) -> Samples:
    """Groups the recorded samples by prompt, those that most models answered first; text is cut at 1,500 characters."""
    found: dict[tuple[str, str], Prompt] = {}
    for summary in story.summaries:
        samples = mapping(summary.content.get("samples"))
        known = [key for key in summary.models if key in samples]
        for key in [*known, *(key for key in samples if key not in summary.models)]:
            css = summary.models[key].style.css if key in summary.models else "s-other"
            for sample in objects(samples[key]):
                task, prompt = words(sample.get("task")), words(sample.get("prompt"))
                answer = words(sample.get("answer")) or NOT_MEASURED
                group = found.setdefault(
                    (task, prompt), Prompt(clean(task, 80), clean(prompt, LONGEST), clean(answer, LONGEST))
                )
                reward = number(sample.get("reward"))
                state = "unknown" if reward is None or 0 < reward < 1 else "yes" if reward >= 1 else "no"
                response = clean(words(sample.get("response")), LONGEST)
                group.answers.append(Answer(summary.label(key), css, response, significant(reward), state))
    if story.summaries and not found:
        story.missing("Sample responses", COMMAND)
    prompts = sorted(found.values(), key=lambda prompt: -len({answer.stage for answer in prompt.answers}))
    return Samples(_by_turns(prompts)[:MOST_PROMPTS], len(prompts))


def _by_turns(prompts: list[Prompt]) -> list[Prompt]:
    """Takes the tasks in turn, so that the first few prompts show every family."""
    queues: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        queues.setdefault(prompt.task, []).append(prompt)
    rounds = max((len(queue) for queue in queues.values()), default=0)
    return [queue[turn] for turn in range(rounds) for queue in queues.values() if turn < len(queue)]
