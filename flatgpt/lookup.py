"""
Guess the next tokens from an earlier place with the same last tokens.

    ahead = LookAhead(model, cache, prompt_ids, most=8)
    logits = ahead.logits(new_ids)  # of one context, (1, V)
    if not ahead.take(next_id): ...  # then next_id is the new one

One pass of the model checks all guesses, so text that repeats itself, as code and chats do, takes
fewer passes. Source: "Prompt Lookup Decoding", Saxena 2023.
"""

import torch

LENGTH = 4  # last tokens that must have stood together before; fewer are wrong too often


class Lookup:
    """Keep a text, and where each run of LENGTH tokens last ended in it.

    It guesses as many ids as the two places have in common before them, up to `most`: the longer a
    text has repeated itself, the likelier it goes on to. guesses: those not yet appended.
    """

    def __init__(self, ids, most):
        self.ids, self.places, self.guesses, self.most = [], {}, [], most
        for i in ids:
            self.append(i)

    def append(self, i):
        """Add an id to the text; -> whether it was guessed. A wrong guess drops all."""
        if len(self.ids) >= LENGTH:
            self.places[tuple(self.ids[-LENGTH:])] = len(self.ids)
        self.ids.append(i)
        is_right = self.guesses[:1] == [i]
        self.guesses = self.guesses[1:] if is_right else []
        return is_right

    def guess(self, room):
        """Guess up to `room` ids that come next; -> a list."""
        ids, most, self.guesses = self.ids, min(room, self.most), []
        start, n = self.places.get(tuple(ids[-LENGTH:])), LENGTH
        if start is None:
            return []
        while n < min(start, most) and ids[start - n - 1] == ids[-n - 1]:
            n += 1
        text = ids[start:]
        for k in range(min(n, most)):  # guesses may repeat themselves
            text.append(text[k])
        self.guesses = text[len(ids) - start :]
        return list(self.guesses)


class LookAhead:
    """Compute the logits after a context and after guesses in one pass.

    cache: a KVCache of one row, from which wrong guesses are removed.
    """

    def __init__(self, model, cache, ids, most):
        self.model, self.cache, self.lookup = model, cache, Lookup(ids, most)
        self.ready = None  # logits after the context and after each of n guesses, (1 + n, V)

    def logits(self, new):
        """Return the logits after the context, (1, V).

        new: the ids of the context that are not cached, (1, T).
        """
        if self.ready is None:
            T, cache = new.size(1), self.cache
            guesses = self.lookup.guess(cache.max_length - cache.length - T)
            new = torch.cat((new, new.new_tensor([guesses])), dim=1)  # (1, T + n)
            self.ready = self.model.logits(self.model.hidden(new, cache)[:, T - 1 :])[0]
        return self.ready[:1]

    def take(self, i):
        """Append an id to the context; -> whether the logits after it are there."""
        n_guesses = len(self.lookup.guesses)
        if self.lookup.append(i):
            self.ready = self.ready[1:]
            return True
        self.cache.go_back_to(self.cache.length - n_guesses)
        self.ready = None
        return False
