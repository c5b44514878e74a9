"""Clusters of directions: of tokens by k-means, and of neurons into groups of equal size.

Shapes: T points, D dimensions, E clusters, N things to be grouped.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROUNDS = 15
"""Of k-means; directions hardly move after ten."""


def k_means(points: Tensor, num_clusters: int, rng: np.random.Generator) -> Tensor:
    """(E, D) unit centroids of the points (T, D) by direction (spherical k-means).

    A cluster that loses all its points keeps its centroid. There are at least E points.
    """
    points = F.normalize(points.float(), dim=-1)
    first = rng.permutation(len(points))[:num_clusters]
    centroids = points[torch.from_numpy(first)]
    for _ in range(ROUNDS):
        members = F.one_hot((points @ centroids.T).argmax(-1), num_clusters).float()
        moved = F.normalize(members.T @ points, dim=-1)
        centroids = torch.where(members.any(0)[:, None], moved, centroids)
    return centroids


def balanced_groups(affinity: Tensor) -> Tensor:
    """(E, N / E) a partition of N things into equal groups, with the most affinity (N, E) in sum.

    Every group takes as many as the next one: an assignment problem, solved exactly. E divides N.
    """
    count, groups = affinity.shape
    size = count // groups
    places = np.repeat(affinity.double().numpy(), size, axis=1)
    _, place = linear_sum_assignment(places, maximize=True)
    return torch.from_numpy(np.argsort(place).reshape(groups, size)).sort(dim=1).values
