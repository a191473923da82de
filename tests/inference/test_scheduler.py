"""The scheduler alone: who runs, with which tokens and pages. No model, no threads."""

import pytest

from deepseek_jax.inference.member import Member
from deepseek_jax.inference.page_pool import PAGE_SIZE, PagePool
from deepseek_jax.inference.scheduler import BEGUN, PATIENCE, Scheduler


def make_scheduler(num_pages=100, num_rows=4, budget=100, num_devices=1, **options):
    return Scheduler([PagePool(num_pages) for _ in range(num_devices)], num_rows, budget, **options)


def member(name, num_prompt=10, max_new_tokens=5, priority=0, at=0.0, first=None, **options):
    """A job whose prompt is its own, unless `first` says with which number it begins."""
    first = 1000 * (ord(name) - 64) if first is None else first
    rank = at - PATIENCE * priority, ord(name)
    return Member(name, rank, range(first, first + num_prompt), max_new_tokens, **options)


def names(members):
    return "".join(found.owner for found in members)


def step(scheduler, **options):
    """Plan a step and read it at once; jobs that have all tokens end. Return pieces and decodes by name."""
    plan = scheduler.plan(**options)
    for chosen in [*plan.decodes, *(piece.member for piece in plan.pieces if piece.is_last)]:
        scheduler.land(chosen, [7])
        if len(chosen.ids) == chosen.most:
            scheduler.end(chosen)
    return {piece.member.owner: piece.end - piece.begin for piece in plan.pieces}, names(plan.decodes)


def test_prompts_are_read_in_pieces_beside_new_tokens():
    """The example of the module's docstring."""
    scheduler = make_scheduler()
    for found in (member("A", 250), member("B", 30)):
        scheduler.add(found)
    assert [step(scheduler) for _ in range(4)] == [
        ({"A": 100}, ""),
        ({"A": 100}, ""),
        ({"A": 50, "B": 30}, ""),
        ({}, "AB"),
    ]


def test_a_long_prompt_stops_nobody():
    """Beside new tokens only 20 of the prompt go through."""
    scheduler = make_scheduler(beside=20)
    scheduler.add(member("A", max_new_tokens=50))
    step(scheduler)
    scheduler.add(member("B", 300))
    assert [step(scheduler) for _ in range(15)] == [({"B": 20}, "A")] * 15


def test_many_short_prompts_stop_nobody():
    """A step in which others get tokens has one call of prefill, of two pieces here."""
    scheduler = make_scheduler(num_rows=8, most_pieces=2)
    scheduler.add(member("A", max_new_tokens=50))
    step(scheduler)
    for name in "BCDEF":
        scheduler.add(member(name))
    assert [list(step(scheduler)[0]) for _ in range(4)] == [["B", "C"], ["D", "E"], ["F"], []]


def test_first_come_first_served_and_priorities_before():
    scheduler = make_scheduler(num_rows=1)
    scheduler.add(member("A", at=0.0))
    step(scheduler)  # A has the row
    for found in (member("D", at=3.0, priority=1), member("C", at=2.0), member("B", at=1.0), member("E", at=4.0)):
        scheduler.add(found)
    order = []
    while scheduler.waiting or scheduler.running:
        order += list(step(scheduler)[0])
    assert order == ["D", "B", "C", "E"]


def test_no_priority_starves_an_old_job():
    scheduler = make_scheduler(num_rows=1)
    scheduler.add(member("A", at=0.0))
    scheduler.add(member("B", at=3 * PATIENCE - 0.1, priority=3))
    scheduler.add(member("C", at=3 * PATIENCE + 0.1, priority=3))
    assert names(scheduler.waiting) == "BAC"


def test_small_jobs_do_not_overtake_a_large_one():
    """B does not fit beside A; C would, and yet waits behind B."""
    scheduler = make_scheduler(num_pages=10, budget=1000)
    for found in (member("A", 5 * PAGE_SIZE, 3), member("B", 7 * PAGE_SIZE, 1), member("C", 10, 1)):
        scheduler.add(found)
    order = [step(scheduler)[0] for _ in range(5)]
    assert order == [{"A": 320}, {}, {}, {"B": 448, "C": 10}, {}]


def test_a_job_that_ranks_before_a_blocked_one_is_tried():
    scheduler = make_scheduler(num_pages=10, budget=1000)
    for found in (member("A", 5 * PAGE_SIZE, 9), member("B", 7 * PAGE_SIZE, 1)):
        scheduler.add(found)
    assert [step(scheduler)[0] for _ in range(2)] == [{"A": 320}, {}]
    scheduler.add(member("C", 10, 1, priority=1))
    assert step(scheduler)[0] == {"C": 10}


def test_the_last_in_rank_gives_its_pages_and_goes_on_later():
    """Three have two pages each of eight, and want five: C gives way, then B; A never does."""
    scheduler = make_scheduler(num_pages=8, budget=1000)
    jobs = [member(name, 2 * PAGE_SIZE - 2, 3 * PAGE_SIZE) for name in "CBA"]
    for found in jobs:
        scheduler.add(found)
    assert step(scheduler)[0] == {"A": 126, "B": 126, "C": 126}
    ended, waited = [], []
    while scheduler.waiting or scheduler.running:
        step(scheduler)
        waited += [found.owner for found in scheduler.waiting if found.owner not in waited]
        ended += [found.owner for found in reversed(jobs) if found.ended and found.owner not in ended]
    assert (waited, ended) == (["C", "B"], ["A", "B", "C"])
    assert scheduler.num_preemptions >= 2 and all(found.num_made == 3 * PAGE_SIZE for found in jobs)
    assert scheduler.lanes[0].pool.num_available == 8 and sorted(scheduler.lanes[0].free_rows) == [0, 1, 2, 3]


def test_the_lowest_free_row_goes_first():
    """Bursts run in the first rows alone: after a load that took all rows, a job alone is in the first again."""
    scheduler = make_scheduler(num_rows=3)
    jobs = [member(name) for name in "ABC"]
    for found in jobs:
        scheduler.add(found)
    step(scheduler)
    assert [found.row for found in jobs] == [0, 1, 2]
    for found in jobs:
        scheduler.end(found)
    late = member("D")
    scheduler.add(late)
    step(scheduler)
    assert late.row == 0


def test_tokens_that_land_while_a_job_waits_are_kept():
    scheduler = make_scheduler()
    job = member("A")
    scheduler.add(job)
    scheduler.plan()
    scheduler.preempt(job)
    assert not scheduler.plan(), "its token is under way"
    scheduler.land(job, [7])
    assert step(scheduler) == ({"A": 11}, "")


def test_what_another_prompt_is_about_to_write_is_awaited():
    """Eight jobs with one prompt of 250: three pages of it go through the model once."""
    scheduler = make_scheduler(num_rows=8)
    jobs = [member(name, 250, first=0) for name in "ABCDEFGH"]
    for found in jobs:
        scheduler.add(found)
    history = [step(scheduler)[0] for _ in range(6)]
    assert history[:3] == [{"A": 100}, {"A": 100}, {"A": 50, "B": 50}]
    assert history[3] == {"B": 8, "C": 58, "D": 34}
    assert [found.cached for found in jobs] == [0, *[192] * 7]


def test_a_page_that_takes_the_place_of_its_like_is_told():
    """Two jobs that must not share from the start write the same page; then the second has the first's."""
    scheduler = make_scheduler(budget=1000)
    jobs = [member(name, 70, first=0, from_start=True) for name in "AB"]
    for found in jobs:
        scheduler.add(found)
    first = {found.owner: table_P.tolist() for found, table_P in scheduler.plan().tables}
    for found in jobs:
        scheduler.land(found, [7])
    second = {found.owner: table_P.tolist() for found, table_P in scheduler.plan().tables}
    assert set(first["A"]).isdisjoint(first["B"])
    assert second["A"] == first["A"] and second["B"] == [first["A"][0], first["B"][1]]


def test_a_page_of_new_tokens_takes_its_like_too():
    """Two jobs that make the same: the second has the first's page as soon as it is full."""
    scheduler = make_scheduler(budget=1000)
    jobs = [member(name, 70, 70, first=0) for name in "AB"]
    for found in jobs:
        scheduler.add(found)
    ahead = []
    while min(len(found.ids) for found in jobs) <= 2 * PAGE_SIZE:
        plan = scheduler.plan()
        for found in ahead:  # one step ahead: the page behind was given before
            scheduler.land(found, [7])
        ahead = [*plan.decodes, *(piece.member for piece in plan.pieces)]
    told = {found.owner: table_P.tolist() for found, table_P in scheduler.plan().tables}
    first = jobs[0].table().tolist()
    assert told["B"][:2] == first[:2] and told["B"][2] != first[2]


def test_a_job_is_let_in_when_those_that_run_can_take_a_page_more():
    scheduler = make_scheduler(num_pages=5, budget=1000)
    for found in (member("A", 60, 2), member("B", 3 * PAGE_SIZE + 1, 1)):
        scheduler.add(found)
    assert [step(scheduler)[0] for _ in range(3)] == [{"A": 60}, {}, {"B": 193}]
    scheduler = make_scheduler(num_pages=6, budget=1000)
    for found in (member("A", 60, 2), member("B", 3 * PAGE_SIZE + 1, 1)):
        scheduler.add(found)
    assert step(scheduler)[0] == {"A": 60, "B": 193}


def test_jobs_of_other_salts_are_not_awaited():
    scheduler = make_scheduler(budget=200)
    for found in (member("A", 150, first=0), member("B", 150, first=0, salt="other")):
        scheduler.add(found)
    assert step(scheduler)[0] == {"A": 150, "B": 50}


def test_one_step_ahead_but_not_with_a_grammar_and_not_behind_the_end():
    scheduler = make_scheduler()
    jobs = [member("A", max_new_tokens=2), member("B", masked=True)]
    for found in jobs:
        scheduler.add(found)
    scheduler.plan()
    assert names(scheduler.plan().decodes) == "A"
    assert not scheduler.plan(), "A will have all its tokens"
    for found in jobs:
        scheduler.land(found, [7])
    assert names(scheduler.plan().decodes) == "B"


def test_pages_are_there_before_a_step_writes():
    """Without reading for some steps: each plan's table has room for the entry that the step writes."""
    scheduler = make_scheduler()
    job = member("A", PAGE_SIZE - 1, 100)
    scheduler.add(job)
    scheduler.plan()
    for written in range(PAGE_SIZE, PAGE_SIZE + 70):
        scheduler.plan()
        assert len(job.table()) == -(-written // PAGE_SIZE)


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_drafts_have_pages_too(num_drafts):
    """A step may write all drafts, and so may the one before it."""
    scheduler = make_scheduler(num_drafts=num_drafts)
    job = member("A", PAGE_SIZE - 1, 100)
    scheduler.add(job)
    step(scheduler)
    assert len(job.table()) == 1
    scheduler.plan()
    assert len(job.table()) == 2  # positions 63 .. 63 + drafts
    scheduler.land(job, [7])
    while len(job.ids) < job.most - 2:
        scheduler.plan()
        assert len(job.table()) * PAGE_SIZE >= len(job.ids) + num_drafts
        scheduler.land(job, [7])


def test_bursts_are_for_rows_that_keep_nobody_waiting():
    """Not with the first token, beside prompts, for a job with fewer tokens left, with a grammar, or in a later row."""
    scheduler = make_scheduler(num_rows=3, burst=4, burst_rows=2)

    def num_tokens():
        plan = scheduler.plan()
        for chosen in [*plan.decodes, *(piece.member for piece in plan.pieces if piece.is_last)]:
            scheduler.land(chosen, [7] * (1 if plan.pieces and chosen not in plan.decodes else plan.num_tokens))
            if len(chosen.ids) == chosen.most:
                scheduler.end(chosen)
        return plan.num_tokens

    scheduler.add(member("A", max_new_tokens=1 + 2 * 4 + 4 + 4 + 1))
    assert [num_tokens() for _ in range(3)] == [1, 4, 4]
    scheduler.add(member("B", 250, max_new_tokens=2))
    assert [num_tokens() for _ in range(4)] == [1, 1, 1, 1]  # three pieces, and the second token of B
    assert [num_tokens(), num_tokens()] == [4, 1]
    jobs = {name: member(name, max_new_tokens=20, masked=name == "M") for name in "CMDE"}
    for name, want in (("C", [1, 4]), ("M", [1, 1]), ("D", [1, 1])):
        scheduler.add(jobs[name])
        assert [num_tokens(), num_tokens()] == want, name
    scheduler.end(jobs["M"])
    assert num_tokens() == 1, "D has the third row"
    scheduler.end(jobs["D"])
    assert num_tokens() == 4
    for name in "DE":
        scheduler.add(member(name, max_new_tokens=20))
    num_tokens()
    scheduler.end(next(found for found in scheduler.running if found.row == 2))
    assert num_tokens() == 4
    scheduler.add(member("F", 6000))
    assert num_tokens() == 1, "a row is free, and pages may be soon"


def test_in_bulk_bursts_run_while_few_rows_are_free():
    """Of 32 rows two may be free while jobs wait; then these begin together, in a step that is no burst."""
    scheduler = make_scheduler(num_rows=32, budget=1000, most_pieces=2, burst=4, burst_rows=32, bulk=True)
    for i in range(36):
        scheduler.add(member(chr(65 + i), max_new_tokens=2 if i == 5 else 100))
    assert step(scheduler)[1] == "" and len(scheduler.running) == 32
    plan = scheduler.plan()
    assert (plan.num_tokens, len(plan.decodes), plan.opened) == (4, 32, []), "one job has one token left"
    for found in plan.decodes:
        scheduler.land(found, [7] * (1 if found.owner == "F" else 4))
    for name, want in (("F", (4, 31, 0)), ("B", (4, 30, 0)), ("C", (1, 29, 3))):
        scheduler.end(next(found for found in scheduler.running if found.owner == name))
        plan = scheduler.plan()
        assert (plan.num_tokens, len(plan.decodes), len(plan.opened)) == want and bool(plan.pieces) == bool(want[2])
    assert scheduler.plan().num_tokens == 4


def test_in_bulk_a_step_for_nobody_lets_others_in():
    """All tokens of fifteen jobs are on their way, one row is free, and a job waits: no burst keeps it."""
    scheduler = make_scheduler(num_rows=16, budget=1000, burst=4, burst_rows=16, bulk=True)
    for i in range(15):
        scheduler.add(member(chr(65 + i), max_new_tokens=5))
    scheduler.plan()
    assert scheduler.plan().num_tokens == 4
    scheduler.add(member("Z"))
    assert names(scheduler.plan().opened) == "Z"


def test_in_bulk_nobody_waits_for_ever():
    """One row, of which none may be free: the next job begins as soon as the last one has ended."""
    scheduler = make_scheduler(num_rows=1, burst=4, burst_rows=1, bulk=True)
    for name in "ABC":
        scheduler.add(member(name, max_new_tokens=3))
    seen = []
    for _ in range(6):
        plan = scheduler.plan()
        seen.append(names(plan.decodes) or names(piece.member for piece in plan.pieces).lower())
        for chosen in [*plan.decodes, *(piece.member for piece in plan.pieces)]:
            scheduler.land(chosen, [7] * (1 if plan.pieces else 2))
            if len(chosen.ids) == chosen.most:
                scheduler.end(chosen)
    assert seen == ["a", "A", "b", "B", "c", "C"] and not scheduler.waiting


def test_a_burst_has_pages_and_takes_none_from_others():
    """Two bursts that are not read have room for all their tokens; where pages are missing there are single tokens."""
    scheduler = make_scheduler(num_pages=2, burst=4, burst_rows=4)
    job = member("A", PAGE_SIZE - 6, 100)
    scheduler.add(job)
    step(scheduler)  # the token behind the prompt, at position 58
    assert [scheduler.plan().num_tokens for _ in range(2)] == [4, 4] and len(job.table()) == 2
    for _ in range(2):
        scheduler.land(job, [7] * 4)
    other = member("B", 10, 100)
    scheduler.add(other)
    job.most = len(job.ids) + 3 + 4
    plans = [scheduler.plan() for _ in range(3)]
    assert not any(plan.opened for plan in plans), "there is no page for it"
    assert [plan.num_tokens for plan in plans] == [1, 1, 1], "a job waits, and a row is free"
    for _ in range(3):
        scheduler.land(job, [7])
    scheduler.end(other)
    assert scheduler.plan().num_tokens == 4
    assert not scheduler.plan(), "all its tokens are on their way"
    scheduler.land(job, [7] * 4)
    assert len(job.ids) == job.most


def test_a_burst_preempts_nobody():
    """One page is left, and two jobs would need one each: they get single tokens while these need none."""
    scheduler = make_scheduler(num_pages=3, budget=1000, burst=4, burst_rows=4)
    jobs = [member(name, PAGE_SIZE - 2, 100) for name in "AB"]
    for found in jobs:
        scheduler.add(found)
    step(scheduler)
    plan = scheduler.plan()
    assert (plan.num_tokens, names(plan.decodes), scheduler.num_preemptions) == (1, "AB", 0)


def test_only_those_that_have_begun():
    scheduler = make_scheduler(num_rows=1)
    jobs = [member("A"), member("B", priority=9)]
    scheduler.add(jobs[0])
    step(scheduler)
    scheduler.add(jobs[1])
    scheduler.preempt(jobs[0])
    assert step(scheduler, admit=BEGUN) == ({"A": 11}, "")


def test_devices_have_pages_of_their_own():
    """Jobs spread; one whose prefix a device has goes there."""
    scheduler = make_scheduler(num_devices=2, num_rows=4, budget=1000, num_pages=20)
    jobs = {name: member(name, 70, max_new_tokens=1) for name in "AB"}
    for found in jobs.values():
        scheduler.add(found)
    plan = scheduler.plan()
    assert {found.row // 2 for found in plan.opened} == {0, 1}
    lane = jobs["B"].row // 2
    for found in jobs.values():
        scheduler.land(found, [7])
        scheduler.end(found)
    again = member("C", 80, first=2000)
    scheduler.add(again)
    scheduler.plan()
    assert again.row // 2 == lane and again.cached == PAGE_SIZE
