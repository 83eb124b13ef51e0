"""Runs actors at the same time, in every order in which their requests can reach the fake service."""
from __future__ import annotations

import threading

from .fakehttp import cut_connection

#: How long an actor may take for a step, in seconds.
DEADLINE = 30


class Schedule:
    """Runs actors at the same time, and lets their requests pass one by one in an order that is chosen.

    Arguments:
        actors: Functions without arguments.
        choices: Numbers of the alternatives to take, step by step; 0 where they end. An alternative is one of the
            actors whose request waits; a second round of these loses the answer to the request.
        losses: How many answers may be lost.

    Attributes:
        taken: The choices that were made, each with the number of alternatives.
        errors: What the actors raised.
    """

    def __init__(self, actors, choices, losses=0):
        self.taken = []
        self.errors = []
        self._choices = iter(choices)
        self._losses = losses
        self._losing = set()
        self._running = len(actors)
        self._turns = {}
        self._condition = threading.Condition()
        self._threads = [threading.Thread(target=self._act, args=(actor,)) for actor in actors]

    def run(self):
        for thread in self._threads:
            thread.start()
        with self._condition:
            while self._everyone_waits_or_is_done() and self._turns:
                self._let_one_pass()
        for thread in self._threads:
            thread.join(DEADLINE)

    def before_request(self):
        """Wait until the request may pass."""
        turn = threading.Event()
        with self._condition:
            self._turns[threading.current_thread()] = turn
            self._running -= 1
            self._condition.notify_all()
        assert turn.wait(DEADLINE), 'The turn never comes.'

    def after_request(self):
        """Lose the answer, if it is to be lost."""
        if threading.current_thread() in self._losing:
            self._losing.clear()
            cut_connection()

    def _everyone_waits_or_is_done(self):
        assert self._condition.wait_for(lambda: not self._running, DEADLINE), 'An actor hangs.'
        return True

    def _let_one_pass(self):
        waiting = [thread for thread in self._threads if thread in self._turns]
        choice = next(self._choices, 0)
        self.taken.append((choice, len(waiting) * (2 if self._losses else 1)))
        lost, number = divmod(choice, len(waiting))
        if lost:
            self._losses -= 1
            self._losing.add(waiting[number])
        self._running += 1
        self._turns.pop(waiting[number]).set()

    def _act(self, actor):
        try:
            actor()
        except Exception as exc:
            self.errors.append(exc)
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()


def following(taken):
    """Return the choices that come after those that were taken, or None after the last ones."""
    while taken and taken[-1][0] + 1 == taken[-1][1]:
        taken = taken[:-1]
    return [choice for choice, _ in taken[:-1]] + [taken[-1][0] + 1] if taken else None
