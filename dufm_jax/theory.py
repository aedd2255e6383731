r"""The paper's formulas: closed-form losses of the DNC and SRG solutions, lemmas, and bounds.

Nothing here builds a matrix of a solution; `solutions` does, independently, and the tests confront
the two. Throughout, n samples a class with \lambda_{H_1} are one sample with n \lambda_{H_1}.

Two formulas of the paper are corrected, as built solutions show: the first eigenvalue of Lemma 16
is printed as (r-2)(5r-19) / ((r-2)(r-3)+2), which is right for r = 4 and 5 only, and the printed
L_DNC(q) lacks the term K \lambda_{W_L} in its denominator.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from dufm_jax import graphs, linalg, scalar
from dufm_jax.problem import Decay, Problem

# --- Lemmas 12 to 18 and Section 4 -------------------------------------------------------------


def row_norm(row: Float[np.ndarray, " K"], order: int) -> float:
    """min ||w||^2 subject to z^T = w^T A_l T_r, at alpha_l = 1 (Lemma 12).

    Args:
      row: z, [K], in the row space of T_r.
      order: r.
    """
    image = graphs.incidence(order) @ row
    mixed = np.sum(image**2) - (3 * order - 4) / (4 * (order - 1) ** 2) * np.sum(image) ** 2
    return ((order - 1) / (order - 2)) ** 2 * mixed


def intermediate_map_norm(order: int) -> float:
    """min ||W_l||_F^2 between intermediate layers, in units of alpha_{l+1}/alpha_l (Lemma 13)."""
    return float(order)


def last_map_norm(order: int) -> float:
    """min ||W_{L-1}||_F^2, in units of alpha_L / alpha_{L-1} (Lemma 14)."""
    r = order
    return (r * (r - 1)) ** 2 / (4 * ((r - 2) * (r - 3) + 2))


def intermediate_spectrum(order: int) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues of M_l^T M_l, 2 <= l <= L-1, in units of alpha_l (Lemma 15).

    Returns:
      Eigenvalues [3] and their multiplicities [3].
    """
    r = order
    return np.array([2, (r - 2) / (r - 1), 0]), _multiplicities(r)


def last_spectrum(order: int) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues of M_L^T M_L, in units of alpha_L (Lemma 16, first one corrected).

    Returns:
      Eigenvalues [3] and their multiplicities [3].
    """
    r = order
    pairs = (r - 2) * (r - 3)
    return np.array([pairs**2 / 2, 2 * (r - 3) ** 2, 2]) / (pairs + 2), _multiplicities(r)


def _multiplicities(r: int) -> np.ndarray:
    return np.array([1.0, r - 1, r * (r - 3) / 2])


def ridge_loss(
    singular_values: Float[Array, " K"], num_classes: int, decay: ArrayLike
) -> Float[Array, ""]:
    r"""min over W of \frac{1}{2K} ||W M - I||_F^2 + \frac{\lambda}{2} ||W||_F^2 (Lemma 17).

    Args:
      singular_values: All K of M, zeros included.
      num_classes: K.
      decay: lambda.
    """
    return jnp.sum(decay / 2 / (singular_values**2 + num_classes * decay))


def factorisation_loss(
    matrix: Float[Array, "m n"], decay_left: ArrayLike, decay_right: ArrayLike
) -> Float[Array, ""]:
    r"""min of \lambda_A/2 ||A||_F^2 + \lambda_B/2 ||B||_F^2 over A B = C (Lemma 18)."""
    strengths = jnp.asarray(decay_left) * decay_right
    return jnp.sqrt(strengths) * jnp.sum(linalg.singular_values(matrix))


def schatten_loss(matrix: Float[Array, "d N"], decay: Decay, depth: int) -> Float[Array, ""]:
    r"""The least regularisation of H_1, W_1, ..., W_{L-1} whose product is given (Section 4).

    It is c ||C||_{S_{2/L}}^{2/L}, close to a multiple of the rank of C for large L, with

      c = \frac{L}{2} (\lambda_{H_1} \prod_{l<L} \lambda_{W_l})^{1/L}.

    Args:
      matrix: C, the input of the last ReLU, [d_L, N].
      decay: The regularisation strengths.
      depth: L.
    """
    strengths = jnp.log(decay.features) + jnp.sum(jnp.log(decay.weights[:-1]))
    power = jnp.sum(linalg.singular_values(matrix) ** (2 / depth))
    return depth / 2 * jnp.exp(strengths / depth) * power


# --- Theorem 5 ---------------------------------------------------------------------------------


def dnc_along_scale(
    problem: Problem, decay: Decay, num_columns: int | None = None
) -> scalar.ScalarLoss:
    r"""L_DNC(q), with \alpha_L as in Definition 10.

      \frac{\lambda_{W_L}}{2} \frac{K}{\alpha_L(q) + K \lambda_{W_L}}
          + \frac{L}{2} K \lambda_{W_{L-1}} q

    Args:
      problem: The sizes.
      decay: The regularisation strengths.
      num_columns: The classes that take part, where they are one block of a solution (Definition
        11.1); by default all K.
    """
    depth, classes = problem.depth, problem.num_classes
    columns = classes if num_columns is None else num_columns
    log_features, log_weights = _log_decay(problem, decay)
    log_alpha = (depth - 1) * log_weights[-2] - log_features - jnp.sum(log_weights[:-2])
    return scalar.ScalarLoss(
        slope=depth / 2 * columns * decay.weights[-2],
        log_gains=jnp.atleast_1d(log_alpha - math.log(classes) - log_weights[-1]),
        multiplicities=np.array([float(columns)]),
        num_classes=classes,
        depth=depth,
    )


def srg_along_scale(problem: Problem, decay: Decay, order: int | None = None) -> scalar.ScalarLoss:
    r"""L_SRG(q) of the proof of Theorem 5, with the spectrum of Lemma 16 corrected.

      \frac{\lambda_{W_L}}{2} \sum_i \frac{m_i}{\mu_i \alpha_L(q) + K \lambda_{W_L}}
          + \frac{L}{2} \sqrt{n \lambda_{H_1} \lambda_{W_1}} (\sqrt2 + \sqrt{(r-1)(r-2)}) q

    Args:
      problem: The sizes.
      decay: The regularisation strengths.
      order: r; by default the one with K = C(r, 2), otherwise that of the block of Definition 11.1.
    """
    depth, classes = problem.depth, problem.num_classes
    r = graphs.order_below(classes) if order is None else order
    log_features, log_weights = _log_decay(problem, decay)
    spectrum, multiplicities = last_spectrum(r)
    log_p = (log_features + log_weights[0]) / 2 + math.log(
        math.sqrt(2) + math.sqrt((r - 1) * (r - 2))
    )
    constant = 4 * ((r - 2) * (r - 3) + 2) / (r - 1) ** 2
    log_alpha = (depth - 2) * log_p + math.log(constant) - (depth - 1) * math.log(r)
    log_alpha -= jnp.sum(log_weights[1:-1])
    return scalar.ScalarLoss(
        slope=depth / 2 * jnp.exp(log_p),
        log_gains=log_alpha + np.log(spectrum) - math.log(classes) - log_weights[-1],
        multiplicities=multiplicities,
        num_classes=classes,
        depth=depth,
    )


def dnc_loss(problem: Problem, decay: Decay) -> Float[Array, ""]:
    """The loss of the DNC solution, min over q >= 0 of L_DNC(q).

    Args:
      problem: The sizes; every width must be at least K.
      decay: The regularisation strengths; may be traced, and differentiated.

    Returns:
      A scalar, at most 1/2, the loss of the zero solution.

    Raises:
      ValueError: if a width is below K or the decay does not fit the problem.

    References:
      Definition 10; proof of Theorem 5.
    """
    problem.check_decay(decay)
    problem.check_widths("the DNC solution", (problem.num_classes,) * problem.depth)
    return scalar.minimise(dnc_along_scale(problem, decay))[1]


def srg_loss(problem: Problem, decay: Decay, construction: str = "auto") -> Float[Array, ""]:
    """The loss of the SRG solution, min over q >= 0 of L_SRG(q).

    Args:
      problem: The sizes: K >= 6, L >= 3, and widths that the construction fits in.
      decay: The regularisation strengths; may be traced, and differentiated.
      construction: "exact", "block", "truncated" or "auto", as in `solutions.srg.build`.

    Returns:
      A scalar, at most 1/2, the loss of the zero solution.

    Raises:
      ValueError: if K, L, a width, the decay or the construction does not fit.

    References:
      Definitions 9 and 11; proof of Theorem 5.
    """
    problem.check_decay(decay)
    names = graphs.srg_constructions(construction, problem)
    return jnp.min(jnp.stack([_SRG_LOSSES[name](problem, decay) for name in names]))


def _exact(problem: Problem, decay: Decay) -> Float[Array, ""]:
    return scalar.minimise(srg_along_scale(problem, decay))[1]


def _block(problem: Problem, decay: Decay) -> Float[Array, ""]:
    remainder = problem.num_classes - math.comb(graphs.order_below(problem.num_classes), 2)
    collapsed = dnc_along_scale(problem, decay, num_columns=remainder)
    return _exact(problem, decay) + scalar.minimise(collapsed)[1]


def _truncated(problem: Problem, decay: Decay) -> Float[Array, ""]:
    # The larger solution's residual W_L M_L - I has the eigenspaces of the triangular graph and so
    # three distinct entries: on the diagonal, between adjacent classes, and between others.
    kept, order = problem.num_classes, graphs.order_above(problem.num_classes)
    whole = math.comb(order, 2)
    larger = Problem(whole, problem.samples_per_class, problem.widths)
    loss = srg_along_scale(larger, decay)
    scale, _ = scalar.minimise(loss)
    residuals = loss.residuals(scale)
    diagonal, adjacent, other = _projector_entries(order) @ residuals
    pairs = 2 * _adjacent_pairs(order, kept)
    fit = (kept * diagonal**2 + pairs * adjacent**2 + (kept * (kept - 1) - pairs) * other**2) / (
        2 * kept
    )
    # Every column of H_1 and every row of W_L has the same norm, and a share of both is dropped.
    share = kept / whole
    last = jnp.sum(loss.multiplicities * residuals * (1 - residuals)) / (2 * whole)
    term = loss.slope * scale / problem.depth
    return fit + share * last + (problem.depth - 1 + share) * term


_SRG_LOSSES = {"exact": _exact, "block": _block, "truncated": _truncated}


def _projector_entries(r: int) -> np.ndarray:
    """Entries [diagonal, adjacent, other; eigenspace] of the triangular graph's projectors."""
    first = np.full(3, 2 / (r * (r - 1)))
    second = (np.array([2, 1, 0]) - 4 / r) / (r - 2)
    return np.stack([first, second, np.array([1, 0, 0]) - first - second], axis=1)


def _adjacent_pairs(order: int, kept: int) -> int:
    """The pairs of edges with a common vertex among the first `kept` edges."""
    degrees = np.full(order, order - 1)
    # Few edges are dropped, fewer than `order`, and they are among the last vertices.
    dropped = math.comb(order, 2) - kept
    last = graphs.order_above(dropped)
    degrees[-last:] -= np.bincount(graphs.edges(last)[-dropped:].ravel(), minlength=last)
    return int(np.sum(degrees * (degrees - 1)) // 2)


def _log_decay(problem: Problem, decay: Decay) -> tuple[Array, Array]:
    features = jnp.log(decay.features) + math.log(problem.samples_per_class)
    return features, jnp.log(decay.weights)


def srg_wins(num_classes: int, depth: int) -> bool:
    """Whether Theorem 5 says L_SRG < L_DNC (where L_DNC is below the zero solution's 1/2)."""
    return num_classes >= (6 if depth >= 4 else 10) and depth >= 3


def ratio_exponent(depth: int) -> float:
    """The exponent of K in L_SRG / L_DNC = O(K^((3 - L) / (2 (L + 1)))), Eq. (3)."""
    return (3 - depth) / (2 * (depth + 1))


# --- Theorem 8 ---------------------------------------------------------------------------------


def within_class_bound(problem: Problem, decay: Decay, epsilon: ArrayLike) -> Float[Array, ""]:
    r"""The largest distance between two features of a class at an optimum, Eq. (5) of Theorem 8.

      \frac{6 \epsilon \sqrt{D (L + 1)}}{(L + 1)^{L+1} \bar\lambda \sqrt n},

    for the model with `dufm.smoothed_relu(epsilon)`, D = max(d_2, ..., d_L) and \bar\lambda the
    product of all decays. It holds in every layer.

    Raises:
      ValueError: if a known decay exceeds 1 / (L + 1), where the theorem says nothing.
    """
    problem.check_decay(decay)
    levels = problem.depth + 1
    known = not any(isinstance(leaf, jax.core.Tracer) for leaf in decay)
    if known and max(float(jnp.max(leaf)) for leaf in decay) > 1 / levels:
        raise ValueError(f"Theorem 8 needs every decay to be at most 1/(L+1) = {1 / levels:.4g}.")
    log_product = jnp.log(decay.features) + jnp.sum(jnp.log(decay.weights))
    log_bound = -levels * math.log(levels) - log_product
    width = max(problem.widths[1:])
    root = math.sqrt(width * levels / problem.samples_per_class)
    return 6 * root * jnp.exp(log_bound) * epsilon
