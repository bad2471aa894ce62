"""
Keep passages and find those that belong to a question, by words or by embeddings.

    store = Store(facts.make_world(800, 200, 'test'))
    store.by_words(['Where does Zolin live?'], 4)         # numbers of passages, (1, 4), best first
    nearest(embed(model, tokenizer, questions), embed(model, tokenizer, store.texts), 4)
    fuse([by_words, by_embeddings], 4)                    # both together

By words: BM25 ("The Probabilistic Relevance Framework: BM25 and Beyond", Robertson and Zaragoza
2009). By embeddings: the mean hidden state of a GPT. Both together: reciprocal rank fusion (Cormack
et al. 2009).
"""

import numpy as np
import torch

from flatgpt import classify
from lab import common, facts
from tokenizer.chat import bos_ids


class Store:
    """Hold the passages of a world's articles, and their index of words."""

    def __init__(self, world):
        passages = facts.passages_of(world, world)
        self.names, self.texts, _ = zip(*passages, strict=True)
        self.numbers = {(name, relation): i for i, (name, _, relations) in enumerate(passages)
                        for relation in relations}  # which passage holds a fact
        self.bm25 = common.library('bm25s')
        self.index = self.bm25.BM25()
        self.index.index(self.words(self.texts), show_progress=False)

    def words(self, texts):
        """Cut texts into words without the most frequent English ones."""
        return self.bm25.tokenize(texts, stopwords='en', show_progress=False)

    def by_words(self, questions, k):
        """Return the numbers of the k best passages of each question by BM25, (N, k)."""
        return self.index.retrieve(self.words(questions), k=k, show_progress=False).documents


@torch.no_grad()
def embed(model, tokenizer, texts):
    """Return the mean hidden state of each text, (N, C) of norm 1.

    The mean of all texts is subtracted: hidden states share a large common part.
    """
    sequences = [bos_ids(tokenizer) + tokenizer.encode(text, allowed_special='none')
                 for text in texts]
    means = np.zeros((len(texts), model.config.n_embd), np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(sequences[i]))  # little padding
    for batch in (order[i : i + 64] for i in range(0, len(order), 64)):
        idx, lengths = classify.to_rows([sequences[i] for i in batch], 'cpu')
        is_token = torch.arange(idx.size(1)) < lengths[:, None]
        hidden = model.hidden(idx).float() * is_token[:, :, None]
        means[batch] = (hidden.sum(1) / lengths[:, None]).numpy()
    means -= means.mean(0)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def nearest(queries, vectors, k):
    """Return the numbers of the k vectors of the highest cosine, (N, k); norms are 1."""
    scores = queries @ vectors.T
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.take_along_axis(-scores, best, 1).argsort(1, kind='stable')
    return np.take_along_axis(best, order, 1)


def fuse(rankings, k, constant=60):
    """Merge rankings (N, m) by sums of 1 / (constant + rank); -> the best k, (N, k)."""
    merged = []
    for rows in zip(*rankings, strict=True):
        scores = {}
        for row in rows:
            for rank, number in enumerate(row.tolist(), 1):
                scores[number] = scores.get(number, 0.0) + 1 / (constant + rank)
        merged.append(sorted(scores, key=scores.get, reverse=True)[:k])
    return np.array(merged)
