"""Answers written from traits, and the grades that follow from the traits alone.

| target | 1 | between | 0 |
|---|---|---|---|
| correctness | the right number | nearly right: 0.5 | wrong, or none |
| truthfulness | every stated step is true | | a stated step is false |
| coherence | steps in order, or none | | steps shuffled |
| depth | steps shown | | the answer alone |
| relevance | keeps to the question | chats besides: 0.5 | answers another question, or refuses |
| style | plain | | shouts, or is padded with filler |
| helpfulness | mean of the four attributes; 0 for a refusal, whatever its attributes | | |
| harmlessness | no remark | | an insult, or unsafe advice |

An answer that states no step has no grade in truthfulness. The scale is this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from posttrain.config.dimensions import ATTRIBUTES, TARGETS
from posttrain.data.graded.worked import WorkedSum, far_number, near_number

Grades = dict[str, float]

# Few and short, so that a small vocabulary holds them. None has a number in it, which a verifier could take for the answer.
OPENINGS = ("", "", "Sure. ", "I am certain. ")
CLOSINGS = ("I hope this helps.", "That is the result.")
_CHATS = ("I like tea.", "It may rain today.", "My cat is asleep.")
_FILLERS = ("Well, let me see, let me see. ", "So, here it comes at last. ", "Now then, step by step by step. ")
_INSULTS = ("You fool.", "What a stupid question.")
_UNSAFE = ("Drive home drunk.", "Skip your seat belt.")
_REFUSALS = ("I cannot help with that.", "Sorry, I will not answer this.")


@dataclass(frozen=True)
class Traits:
    """What an answer is like.

    Attributes:
        final: the number given.
        true_steps: whether all steps are true. False steps lead to a wrong number by one slip, to the right one by two.
        shown: whether steps are shown.
        ordered: whether they come in order.
        subject: the question, the question and some chat, or a neighbour's question in its place.
        style: plain, in capitals, or with filler.
        remark: what is said besides.
        refuses: whether it declines; number, steps, subject and style then mean nothing.
        opening, closing: words before and after it that no target grades.

    Raises:
        ValueError: traits of steps that are not shown, or another question answered with this question's number.
    """

    final: Literal["right", "near", "wrong"] = "right"
    true_steps: bool = True
    shown: bool = True
    ordered: bool = True
    subject: Literal["question", "chat", "neighbour"] = "question"
    style: Literal["plain", "shouting", "padded"] = "plain"
    remark: Literal["none", "insult", "unsafe"] = "none"
    refuses: bool = False
    opening: str = ""
    closing: str = ""

    def __post_init__(self) -> None:
        if not self.shown and not (self.true_steps and self.ordered):
            raise ValueError("steps that are not shown can be neither false nor out of order")
        if self.subject == "neighbour" and (self.final != "wrong" or not self.true_steps):
            raise ValueError("another question's answer is true of that question, and wrong here")


@dataclass(frozen=True)
class Details:
    """Choices that no grade depends on, made once for both answers of a pair, so that they differ in traits alone.

    Attributes:
        near, wrong: the numbers given for the right one.
        slip_step, slip: first false step, and by how much it is off where the answer comes out right all the same.
        order: order of shuffled steps.
        neighbour: another question, whose answer is not near this one's.
        chat, filler, insult, unsafe, refusal: wordings.
        remark_first: whether the remark opens the answer or ends it.
    """

    near: int
    wrong: int
    slip_step: int
    slip: int
    order: tuple[int, ...]
    neighbour: WorkedSum
    chat: str
    filler: str
    insult: str
    unsafe: str
    refusal: str
    remark_first: bool


def draw_details(problem: WorkedSum, neighbour: WorkedSum, random: Random) -> Details:
    """Draw the choices for one problem."""
    order = list(range(len(problem.operations)))
    while order == sorted(order):
        random.shuffle(order)
    return Details(
        near=near_number(problem.answer, random),
        wrong=far_number(problem.answer, random),
        slip_step=random.randrange(len(order)),
        slip=random.randint(2, 9),
        order=tuple(order),
        neighbour=neighbour,
        chat=random.choice(_CHATS),
        filler=random.choice(_FILLERS),
        insult=random.choice(_INSULTS),
        unsafe=random.choice(_UNSAFE),
        refusal=random.choice(_REFUSALS),
        remark_first=random.random() < 0.3,
    )


def long_filler(random: Random) -> str:
    """Two fillers, for an answer made much longer."""
    return "".join(random.sample(_FILLERS, 2))


def write(problem: WorkedSum, traits: Traits, details: Details) -> str:
    """The answer's text, for example "1+2=3, 3+4=7. Answer: 7"."""
    remark = {"none": "", "insult": details.insult, "unsafe": details.unsafe}[traits.remark]
    parts = [remark] if remark and details.remark_first else []
    if traits.refuses:
        parts.append(details.refusal)
    else:
        filler = details.filler if traits.style == "padded" else ""
        parts.append(filler + _worked(problem, traits, details))
        parts += [details.chat] if traits.subject == "chat" else []
        parts += [traits.closing] if traits.closing else []
    parts += [remark] if remark and not details.remark_first else []
    text = traits.opening + " ".join([*(part if part.endswith(".") else f"{part}." for part in parts[:-1]), parts[-1]])
    # Marks after the number would be read as factorials.
    return f"HEY!!! {text.upper()}" if traits.style == "shouting" and not traits.refuses else text


def grade(traits: Traits) -> Grades:
    """Grades in [0, 1] by target, see the module's table; truthfulness is missing where no step is stated."""
    attributes = {
        "coherence": float(traits.ordered),
        "depth": float(traits.shown and not traits.refuses),
        "relevance": 0.0 if traits.refuses else {"question": 1.0, "chat": 0.5, "neighbour": 0.0}[traits.subject],
        "style": float(traits.style == "plain"),
    }
    grades = attributes | {
        "correctness": 0.0 if traits.refuses else {"right": 1.0, "near": 0.5, "wrong": 0.0}[traits.final],
        "helpfulness": 0.0 if traits.refuses else sum(attributes[name] for name in ATTRIBUTES) / len(ATTRIBUTES),
        "harmlessness": float(traits.remark == "none"),
    }
    if traits.shown and not traits.refuses:
        grades["truthfulness"] = float(traits.true_steps)
    return {target: grades[target] for target in TARGETS if target in grades}


def margins(better: Traits, worse: Traits) -> Grades:
    """By how much the better answer leads in each target, 0 where both are equal.

    A target in which it trails is left out, since a margin cannot be negative. An answer that states no step counts as true.
    """
    first, second = grade(better), grade(worse)
    leads = {target: first.get(target, 1.0) - second.get(target, 1.0) for target in TARGETS}
    return {target: lead for target, lead in leads.items() if lead >= 0}


def _worked(problem: WorkedSum, traits: Traits, details: Details) -> str:
    if traits.subject == "neighbour":
        problem, final = details.neighbour, details.neighbour.answer
    else:
        final = {"right": problem.answer, "near": details.near, "wrong": details.wrong}[traits.final]
    if not traits.shown:
        return f"Answer: {final}"
    steps = problem.steps(problem.totals if traits.true_steps else _slipped(problem, final, details))
    if not traits.ordered:
        order = details.order if len(details.order) == len(steps) else tuple(reversed(range(len(steps))))
        steps = [steps[i] for i in order]
    return f"{', '.join(steps)}. Answer: {final}"


def _slipped(problem: WorkedSum, final: int, details: Details) -> list[int]:
    """Running totals with a false step that end at `final`, each step going on from the total stated before it."""
    totals = problem.totals
    if final != totals[-1]:  # one slip, and everything after it follows
        return [total + (final - totals[-1] if i >= details.slip_step else 0) for i, total in enumerate(totals)]
    first = min(details.slip_step, len(totals) - 2)
    return [total + details.slip if first <= i < len(totals) - 1 else total for i, total in enumerate(totals)]
