"""The verdict on a run in words: how much was hidden, how busy links and clients were, what would hide the rest.

Every number in it comes from the run; estimates are marked as such.
"""

from __future__ import annotations

from parablock_rt.report import figures
from parablock_rt.report.figures import Activity, Forecast
from parablock_rt.report.folder import Recorded, number

HIDDEN = 0.95
"""From this share on, communication counts as hidden. Not 1: no training follows that could hide the last exchange."""

STRAGGLER = 0.1
"""A client counts as slow if its uploads are late by more than this share of a round."""

_WORTH_A_WORD_S = 0.05  # a shorter time reads as 0.0
_IN_SECONDS_S = 0.01  # a shorter time is said in milliseconds


def percent(share: float) -> str:
    """A share as text; only exactly 1 and 0 read as 100 % and 0 %."""
    text = f"{100 * share:.0f}"
    if (text == "100") != (share >= 1) or (text in ("0", "-0")) != (share == 0):
        text = f"{100 * share:.1f}"
    return f"{text}\N{NO-BREAK SPACE}%"


def verdict(run: Recorded) -> str:
    """The verdict as one paragraph. It says what is unknown instead of guessing."""
    staleness = number(run.summary.get("staleness"))
    forecast, busy = figures.forecast(run), figures.activity(run)
    parts = [_hidden(run, staleness), _busy(busy), _advice(run, forecast, staleness), _slow(run), _outcome(run)]
    return " ".join(part for part in parts if part)


def _hidden(run: Recorded, staleness: float | None) -> str:
    exposed, compute = number(run.summary.get("exposed_comm_s")), number(run.summary.get("compute_s"))
    if exposed is None or compute is None:
        return _so_far(run)
    others = number(run.summary.get("waited_for_others_s")) or 0.0
    blocked = exposed + others
    of_it = f", {others:.1f} s of it for other clients," if others >= _WORTH_A_WORD_S else ""
    waited = f"the training thread waited {blocked:.1f} s{of_it} in addition to {compute:.1f} s of computing"
    if number(run.summary.get("resumed_from")) is not None:
        waited += ", including the time without a server"
    elif number(run.summary.get("reconnects")):
        waited += ", including the time without a connection"
    if staleness == 0:
        return f"Nothing was hidden, as expected at staleness 0: {waited}."
    found = figures.hidden(run)
    if found is None:
        share = percent(blocked / (blocked + compute)) if blocked + compute > 0 else "none"
        return f"{waited[0].upper()}{waited[1:]} ({share} of its time)."
    if found.share < 0:
        longer = "the wait for communication is longer than all transfers take one after another"
        return f"Nothing was hidden: {waited}; {longer}."
    if not found.measured:
        return (
            f"About {percent(found.share)} of the communication was hidden, by the length of its transfers: {waited}."
        )
    return f"{percent(found.share)} of the communication was hidden: {waited}."


def _so_far(run: Recorded) -> str:
    """What the lines of the rounds say, for a run without a summary."""
    unknown = "How much of the communication was hidden is not known: the summary does not say."
    lines = [(number(line.get("exposed_s")), number(line.get("compute_s"))) for line in run.rounds]
    known = [(exposed, compute) for exposed, compute in lines if exposed is not None and compute is not None]
    if not known:
        return unknown
    waited, computed = (sum(seconds) for seconds in zip(*known, strict=True))
    plural = "" if len(known) == 1 else "s"
    return (
        f"{unknown} In the {len(known)} recorded round{plural} the training thread waited {waited:.1f} s in addition "
        f"to {computed:.1f} s of computing."
    )


def _busy(busy: Activity | None) -> str:
    if busy is None or busy.idle_link is None:
        return ""
    return f"The link was idle {percent(max(0.0, busy.idle_link))} of the time."


def _advice(run: Recorded, forecast: Forecast | None, staleness: float | None) -> str:
    if forecast is None or staleness is None:
        return ""
    found = figures.hidden(run)
    if found is not None and found.share < 0:
        return ""  # training waited for something other than transfers, and more steps may not help
    enough = forecast.steps_to_hide(int(staleness))
    plural = "" if enough == 1 else "s"
    exchange = f"an exchange takes {'' if forecast.measured else 'about '}{_duration(forecast.exchange_s)}"
    if staleness == 0:
        return f"With staleness 1, {enough} local step{plural} per round would hide it: {exchange}."
    if enough > forecast.steps and found is not None and found.share >= HIDDEN:
        return ""  # it is hidden by more than the steps, such as an evaluation between rounds
    if enough > forecast.steps:
        return f"{enough} local steps per round instead of {forecast.steps} would hide the rest: {exchange}."
    if enough < forecast.steps and (found is None or found.share < HIDDEN):
        return f"{exchange[0].upper()}{exchange[1:]}, which {enough} of the {forecast.steps} local steps would hide."
    if enough < forecast.steps:
        return f"With {enough} local step{plural} instead of {forecast.steps} it would still be hidden: {exchange}."
    return f"With fewer than {forecast.steps} local steps it would not be: {exchange}."


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= _IN_SECONDS_S else f"{1e3 * seconds:.2g} ms"


def _slow(run: Recorded) -> str:
    table = figures.clients(run)
    lengths = [value for line in run.rounds if (value := number(line.get("open_s"))) is not None]
    if len(table) < 2 or sum(lengths) <= 0 or not table[0]["late_s"]:
        return ""
    share = table[0]["late_s"] / (sum(lengths) / len(lengths))
    if share < STRAGGLER:
        return ""
    return (
        f"Client {table[0]['client']} comes last: its uploads are {table[0]['late_s']:.2f} s behind the first, "
        f"{percent(share)} of a round."
    )


def _outcome(run: Recorded) -> str:
    before, after = number(run.summary.get("eval_loss_before")), number(run.summary.get("eval_loss_after"))
    if before is None or after is None:
        return ""
    return f"Held-out loss went from {before:.4f} to {after:.4f}."
