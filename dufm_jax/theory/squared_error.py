r"""Closed-form losses of the DNC and SRG solutions under squared error.

Both losses are a minimum over one scale q >= 0 (see `scalar`). They are for nonlinearities
a max(x, 0) + b min(x, 0) with a > 0, the ReLU being a = 1, b = 0. Where the class means that enter
such a layer are not negative, its image is a times that of the ReLU, and all is as for the ReLU
with \lambda_{W_l} / a_l^2 for \lambda_{W_l}.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from dufm_jax import graphs, scalar
from dufm_jax.problem import Decay, DecayLike, Problem
from dufm_jax.theory.lemmas import last_spectrum

_DNC, _SRG = "the DNC solution", "the SRG solution"


def decay_product(problem: Problem, decay: DecayLike) -> Float[Array, ""]:
    r"""Returns n \lambda_{H_1} \prod_l \lambda_{W_l}, all that the losses take of the decays.

    Two problems that differ in their decays alone, with equal products, have the same L_DNC and the
    same L_SRG. For nonlinearities with \sigma(s x) = s \sigma(x), s > 0, scaling one layer up by s
    and another down by s leaves the outputs, so that dividing the decay of one by s^2 and
    multiplying that of the other by s^2 gives the same loss; any two sets of decays of one product
    are joined by such moves. H_1 has n columns a class, hence the n; for classes of different sizes
    it is their mean N / K.

    Args:
      problem: The sizes.
      decay: The regularisation strengths; may be traced, and 0.
    """
    decay = Decay.of(decay, problem.depth)
    mean_count = problem.num_samples / problem.num_classes
    return mean_count * decay.features * jnp.prod(decay.weights)


def dnc_along_scale(
    problem: Problem,
    decay: DecayLike,
    num_columns: int | None = None,
    samples: ArrayLike | None = None,
) -> scalar.ScalarLoss:
    r"""Returns L_DNC(q), with \alpha_L as in Definition 10.

      \frac{\lambda_{W_L}}{2} \frac{K}{\alpha_L(q) + K \lambda_{W_L}} + \frac{L}{2} K e_{L-1} q,
      \alpha_L(q) = e_{L-1}^{L-1} q^L / \prod_{l < L-1} e_l,
      (e_0, ..., e_{L-1}) = (n \lambda_{H_1}, \lambda_{W_1}, ..., \lambda_{W_{L-1}}).

    A class of n_k samples contributes the K-th part of this with n_k for n and N / n_k for K in its
    fit and ridge, whatever the others contribute.

    Args:
      problem: The sizes.
      decay: The regularisation strengths.
      num_columns: The classes that take part, where they are one block of a solution (Definition
        11.1); by default all K.
      samples: The n_k of these classes, which may be traced; by default n.

    Raises:
      ValueError: if the decay, the loss or a nonlinearity does not fit, or classes differ in size
        and `samples` does not say which are meant.
    """
    decay, slopes = scalar.requirements(_DNC, problem, decay)
    if samples is None:
        if not problem.is_balanced:
            raise ValueError(
                "classes of different sizes have a scale each, so that the samples must be given."
            )
        samples = problem.num_samples // problem.num_classes
    columns = problem.num_classes if num_columns is None else num_columns
    share = jnp.asarray(samples) / problem.num_samples
    chain, log_last = _log_chain(decay, slopes, samples)
    log_alpha = (problem.depth - 1) * chain[-1] - jnp.sum(chain[:-1])
    return scalar.ScalarLoss(
        slope=problem.depth / 2 * columns * jnp.exp(chain[-1]),
        log_gains=jnp.atleast_1d(log_alpha + jnp.log(share) - log_last),
        weights=jnp.atleast_1d(columns * share / 2),
        depth=problem.depth,
    )


def srg_along_scale(
    problem: Problem, decay: DecayLike, order: int | None = None
) -> scalar.ScalarLoss:
    r"""Returns L_SRG(q) of the proof of Theorem 5, with the spectrum of Lemma 16 corrected.

      \frac{\lambda_{W_L}}{2} \sum_i \frac{m_i}{\mu_i \alpha_L(q) + K \lambda_{W_L}}
          + \frac{L}{2} \sqrt{n \lambda_{H_1} \lambda_{W_1}} (\sqrt2 + \sqrt{(r-1)(r-2)}) q

    Args:
      problem: The sizes.
      decay: The regularisation strengths.
      order: r; by default the one with K = C(r, 2), otherwise that of the block of Definition 11.1.

    Raises:
      ValueError: if the decay, the loss or a nonlinearity does not fit, or classes differ in size.
    """
    decay, slopes = scalar.requirements(_SRG, problem, decay)
    depth, classes, samples = problem.depth, problem.num_classes, graphs.equal_count(problem)
    r = graphs.order_below(classes) if order is None else order
    # The pre-activation of layer L alone has negative entries: its slopes enter the spectrum.
    *inner, last = slopes
    chain, log_last = _log_chain(decay, (*inner, (1.0, 0.0)), samples)
    spectrum, multiplicities = last_spectrum(r, last)
    log_p = (chain[0] + chain[1]) / 2 + math.log(math.sqrt(2) + math.sqrt((r - 1) * (r - 2)))
    constant = 4 * ((r - 2) * (r - 3) + 2) / (r - 1) ** 2
    log_alpha = (depth - 2) * log_p + math.log(constant) - (depth - 1) * math.log(r)
    log_alpha -= jnp.sum(chain[2:])
    with np.errstate(divide="ignore"):  # A mode that the last image lacks cannot be fitted.
        log_spectrum = np.log(spectrum)
    return scalar.ScalarLoss(
        slope=depth / 2 * jnp.exp(log_p),
        log_gains=log_alpha + log_spectrum - math.log(classes) - log_last,
        weights=multiplicities / (2 * classes),
        depth=depth,
    )


def _log_chain(
    decay: Decay, slopes: scalar.Slopes, samples: ArrayLike
) -> tuple[Float[Array, " L"], Float[Array, ""]]:
    r"""Returns log (n \lambda_{H_1}, \lambda_{W_1}, ..., \lambda_{W_{L-1}}) and log \lambda_{W_L}.

    Each \lambda_{W_l} is divided by the squared slope of layer l, whose output W_l takes.
    """
    first = jnp.log(decay.features) + jnp.log(samples)
    weights = jnp.log(decay.weights) - 2 * np.log([1.0, *(above for above, _ in slopes)])
    return jnp.concatenate([first[None], weights[:-1]]), weights[-1]


def dnc_loss(problem: Problem, decay: DecayLike) -> Float[Array, ""]:
    """Returns the loss of the DNC solution, min over q >= 0 of L_DNC(q).

    Under squared error each class adds its own term, so that classes of different sizes have a
    scale q each (Dang et al., 2023, for linear layers). It depends on the decays through
    `decay_product` alone.

    Args:
      problem: The sizes; every width must be at least K.
      decay: The regularisation strengths, positive; may be traced, and differentiated. NaN results
        where a traced one is not positive.

    Returns:
      A scalar, at most 1/2, the loss of the zero solution.

    Raises:
      ValueError: if a width is below K, or the decay, the loss or a nonlinearity does not fit.

    References:
      Definition 10; proof of Theorem 5.
    """
    problem.check_widths(_DNC, (problem.num_classes,) * problem.depth)
    if problem.is_balanced:
        return scalar.minimise(dnc_along_scale(problem, decay))[1]

    def of_class(samples):
        return scalar.minimise(dnc_along_scale(problem, decay, 1, samples))[1]

    return jnp.sum(jax.vmap(of_class)(np.array(problem.class_counts, float)))


def srg_losses(
    problem: Problem, decay: DecayLike, construction: str = "auto"
) -> dict[str, Float[Array, ""]]:
    """Returns the loss of the SRG solution by each construction that fits.

    The construction of least loss is the one that `solutions.srg.build(..., "auto")` returns.

    Args:
      problem: As for `srg_loss`.
      decay: As for `srg_loss`.
      construction: "auto" for all that fit in the widths, or one of them.

    Returns:
      Scalars by "exact" for K = C(r, 2), otherwise by "block" and "truncated".

    Raises:
      ValueError: as `srg_loss`.
    """
    names = graphs.srg_constructions(construction, problem)
    return {name: _SRG_LOSSES[name](problem, decay) for name in names}


def srg_loss(problem: Problem, decay: DecayLike, construction: str = "auto") -> Float[Array, ""]:
    """Returns the loss of the SRG solution, min over q >= 0 of L_SRG(q).

    It is the least of `srg_losses`, which says what each construction attains, and depends on the
    decays through `decay_product` alone.

    Args:
      problem: The sizes: K >= 6 classes of equally many samples, L >= 3, and widths that the
        construction fits in.
      decay: The regularisation strengths, positive; may be traced, and differentiated. NaN results
        where a traced one is not positive.
      construction: "exact", "block", "truncated" or "auto", as in `solutions.srg.build`.

    Returns:
      A scalar, at most 1/2, the loss of the zero solution.

    Raises:
      ValueError: if K, L, a width, the decay, the loss, a nonlinearity or the construction does not
        fit.

    References:
      Definitions 9 and 11; proof of Theorem 5.
    """
    return jnp.min(jnp.stack([*srg_losses(problem, decay, construction).values()]))


def _exact(problem: Problem, decay: DecayLike) -> Float[Array, ""]:
    return scalar.minimise(srg_along_scale(problem, decay))[1]


def _block(problem: Problem, decay: DecayLike) -> Float[Array, ""]:
    remainder = problem.num_classes - math.comb(graphs.order_below(problem.num_classes), 2)
    collapsed = dnc_along_scale(problem, decay, num_columns=remainder)
    return _exact(problem, decay) + scalar.minimise(collapsed)[1]


def _truncated(problem: Problem, decay: DecayLike) -> Float[Array, ""]:
    # The larger solution's residual W_L M_L - I has the eigenspaces of the triangular graph and so
    # three distinct entries: on the diagonal, between adjacent classes, and between others.
    kept, order = problem.num_classes, graphs.order_above(problem.num_classes)
    whole = math.comb(order, 2)
    loss = srg_along_scale(dataclasses.replace(problem, num_classes=whole), decay)
    scale, _ = scalar.minimise(loss)
    residuals = loss.residuals(scale)
    diagonal, adjacent, other = _projector_entries(order) @ residuals
    pairs = 2 * _adjacent_pairs(order, kept)
    fit = (kept * diagonal**2 + pairs * adjacent**2 + (kept * (kept - 1) - pairs) * other**2) / (
        2 * kept
    )
    # Every column of H_1 and every row of W_L has the same norm, and a share of both is dropped.
    share = kept / whole
    last = jnp.sum(loss.weights * residuals * (1 - residuals))
    term = loss.slope * scale / problem.depth
    return fit + share * last + (problem.depth - 1 + share) * term


_SRG_LOSSES = {"exact": _exact, "block": _block, "truncated": _truncated}


def _projector_entries(r: int) -> np.ndarray:
    """Returns the triangular graph's projectors: [diagonal, adjacent, other; eigenspace]."""
    first = np.full(3, 2 / (r * (r - 1)))
    second = (np.array([2, 1, 0]) - 4 / r) / (r - 2)
    return np.stack([first, second, np.array([1, 0, 0]) - first - second], axis=1)


def _adjacent_pairs(order: int, kept: int) -> int:
    """Returns the number of pairs of edges with a common vertex among the first `kept` edges."""
    degrees = np.full(order, order - 1)
    # Few edges are dropped, fewer than `order`, and they are among the last vertices.
    dropped = math.comb(order, 2) - kept
    last = graphs.order_above(dropped)
    degrees[-last:] -= np.bincount(graphs.edges(last)[-dropped:].ravel(), minlength=last)
    return int(np.sum(degrees * (degrees - 1)) // 2)
