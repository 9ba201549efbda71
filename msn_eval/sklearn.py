"""The protocols as scikit-learn classifiers: NumPy arrays or torch tensors in, NumPy arrays out."""

import warnings
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from msn_eval.probes.base import centre_rows, normalise_rows
from msn_eval.probes.knn import neighbour_vote
from msn_eval.probes.knn_search import index_rows, search_nearest
from msn_eval.probes.linear import Recipe, train_heads
from msn_eval.probes.logistic import LARGEST_GAP, SOLVERS, reduced_rows
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem
from msn_eval.probes.logistic_solvers.reference_solvers import MINIMISERS
from msn_eval.probes.ncm import class_directions
from msn_eval.probes.ridge import solve_ridge

__all__ = ["LinearProbe", "LogisticProbe", "NearestClassMean", "NearestNeighbourProbe", "RidgeProbe"]

Floats = NDArray[np.float64]


class _Probe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Base of the probes: checks the input, encodes the classes, and predicts the one that scores highest."""

    def fit(self, X: Any, y: Any) -> Self:
        """Fit the probe.

        Args:
            X: (n, d) floating array or tensor.
            y: (n,) class labels.

        Raises:
            ValueError: The input is not finite, not two-dimensional, or not a classification.
        """
        X, y = validate_data(self, _array(X), _array(y), dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        self._fit(_tensor(X), torch.from_numpy(labels.astype(np.int64)))
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the class of each row, (n,); of equal scores the first in the order of `classes_`."""
        scores = self._scored(X)
        return self.classes_[scores.argmax(axis=1)]  # type: ignore[no-any-return]

    def decision_function(self, X: Any) -> Floats:
        """Return float64 scores, higher is better: (n, classes), or for two classes (n,), above 0 for the second."""
        return _binary_scores(self._scored(X))

    def _scored(self, X: Any) -> Floats:
        check_is_fitted(self)
        X = validate_data(self, _array(X), dtype=[np.float64, np.float32], reset=False)
        return self._scores(_tensor(X)).numpy()

    def _check_classes(self) -> None:
        if len(self.classes_) < 2:
            raise ValueError(f"{type(self).__name__} needs labelled rows of at least two classes, not of 1 class.")

    def _fit(self, X: Tensor, labels: Tensor) -> None:
        raise NotImplementedError

    def _scores(self, X: Tensor) -> Tensor:
        raise NotImplementedError


class _CentredProbe(_Probe):
    """Base of the probes on the rows of the logistic protocol: each minus its own mean, of length 1."""

    preprocess: bool
    coef_: Floats
    intercept_: Floats

    def _scores(self, X: Tensor) -> Tensor:
        return self._rows(X) @ torch.from_numpy(self.coef_).T + torch.from_numpy(self.intercept_)

    def _rows(self, X: Tensor) -> Tensor:
        return centre_rows(X) if self.preprocess else X.to(torch.float64)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # centring a row of two features leaves one of two directions
        return tags


class _Softmax:
    """Mixin: probabilities by the softmax of the scores."""

    def predict_proba(self, X: Any) -> Floats:
        """Return the probability of each class, (n, classes) float64."""
        scores = self._scored(X)  # type: ignore[attr-defined]
        return torch.from_numpy(scores).softmax(dim=1).numpy()


class LogisticProbe(_Softmax, _CentredProbe):
    """The logistic protocol: mean softmax cross-entropy + (lam / n) / 2 ||W||^2, no intercept.

    Source: arXiv:2204.07141, appendix A.2.

    Args:
        lam: Positive; scikit-learn's C is 1 / lam (2 / lam for its binary form).
        solver: auto, newton, lbfgs, cyanure or sklearn.
        tol: Relative duality gap at which newton and lbfgs stop; cyanure and sklearn have tolerances of their own.
        preprocess: Centre each row and scale it to length 1, as the protocol does.

    Attributes:
        coef_: (classes, d) float64, for the prepared rows.
        objective_: Value of the objective.
        certificate_: Relative duality gap, an upper bound of how far objective_ is above the minimum.
        converged_: Whether certificate_ is at most 1e-3; otherwise `fit` warns.
        n_iter_: Number of the solver's steps.
    """

    def __init__(self, lam: float = 0.0025, solver: str = "auto", tol: float = 1e-6, preprocess: bool = True) -> None:
        self.lam, self.solver, self.tol, self.preprocess = lam, solver, tol, preprocess

    def _fit(self, X: Tensor, labels: Tensor) -> None:
        _check_positive(lam=self.lam, tol=self.tol)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}, not one of {', '.join(SOLVERS)}.")
        self._check_classes()
        rows, basis = reduced_rows(self._rows(X))
        problem = CrossEntropyProblem(rows=rows, labels=labels, n_classes=len(self.classes_), mu=self.lam / len(X))
        solution, self.n_iter_ = MINIMISERS[self.solver](problem, target=self.tol)
        weights = solution.weights.to(torch.float64)
        self.coef_ = (weights if basis is None else weights @ basis.T).numpy()
        self.certificate_, self.objective_ = solution.gap, solution.objective
        self.converged_ = solution.gap <= LARGEST_GAP
        if not self.converged_:
            message = f"the relative duality gap is {solution.gap:.1e}, above {LARGEST_GAP:g}"
            warnings.warn(message, ConvergenceWarning, stacklevel=3)

    def _scores(self, X: Tensor) -> Tensor:
        return self._rows(X) @ torch.from_numpy(self.coef_).T


class NearestNeighbourProbe(_Softmax, _Probe):
    """The knn protocol: the k nearest rows by cosine vote for their classes with weight exp(cosine / temperature).

    Source: Wu et al. 2018, arXiv:1805.01978.

    Args:
        k: Number of neighbours; above the number of rows it is lowered to that, with a warning.
        temperature: Positive.
        metric: "cosine".

    Attributes:
        k_: The k that is used.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07, metric: str = "cosine") -> None:
        self.k, self.temperature, self.metric = k, temperature, metric

    def _fit(self, X: Tensor, labels: Tensor) -> None:
        _check_positive(k=self.k, temperature=self.temperature)
        if self.metric != "cosine":
            raise ValueError(f"metric is {self.metric!r}; the protocol has only cosine.")
        self.k_ = min(int(self.k), len(X))
        if self.k_ < self.k:
            warnings.warn(f"k = {self.k} neighbours among {len(X)} rows: all {len(X)} vote", stacklevel=3)
        self.bank_, self.labels_ = index_rows(X), labels

    def _scores(self, X: Tensor) -> Tensor:
        cosines, nearest = search_nearest(X, self.bank_, self.k_)
        return neighbour_vote(
            cosines, self.labels_[nearest], n_classes=len(self.classes_), temperature=float(self.temperature)
        )

    def decision_function(self, X: Any) -> Floats:
        """Return shares of the votes: (n, classes), or for two classes (n,), the second's minus the first's."""
        return _binary_scores(self.predict_proba(X))


class NearestClassMean(_Probe):
    """The ncm protocol: cosine to the mean of each class's rows of length 1.

    Source: Mensink et al. 2013, "Distance-based image classification"; with cosines, Snell et al. 2017.

    Attributes:
        coef_: (classes, d) float64 directions of the means.
    """

    def _fit(self, X: Tensor, labels: Tensor) -> None:
        self.coef_ = class_directions(normalise_rows(X), labels, n_classes=len(self.classes_)).numpy()

    def _scores(self, X: Tensor) -> Tensor:
        return normalise_rows(X) @ torch.from_numpy(self.coef_).T


class RidgeProbe(_CentredProbe):
    """The ridge protocol: one-hot targets minus the class prior, an unpenalised bias, alpha by leave-one-out error.

    Source: Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", sections 4.2 and 7.10.

    Args:
        preprocess: Centre each row and scale it to length 1, as the protocol does.

    Attributes:
        coef_: (classes, d) float64, for the prepared rows.
        intercept_: (classes,) float64.
        alpha_: The chosen penalty.
        objective_: Mean squared leave-one-out error at alpha_.
    """

    def __init__(self, preprocess: bool = True) -> None:
        self.preprocess = preprocess

    def _fit(self, X: Tensor, labels: Tensor) -> None:
        self._check_classes()
        fit = solve_ridge(self._rows(X), labels, n_classes=len(self.classes_))
        self.coef_ = fit.weights.T.numpy()
        self.intercept_ = (fit.bias - fit.centre @ fit.weights).numpy()
        self.alpha_, self.objective_ = fit.alpha, float(fit.errors.min())


class LinearProbe(_Softmax, _CentredProbe):
    """A linear layer with bias by SGD with Nesterov momentum 0.9, with a cosine schedule of the learning rate.

    Args:
        lr: Learning rate of the first step.
        weight_decay: Of the weights, not of the bias.
        epochs: Passes over the rows.
        batch_size: Rows per step; above the number of rows, all of them.
        seed: Of the order of rows; the layer starts from zero.
        preprocess: Centre each row and scale it to length 1, as the protocol does.

    Attributes:
        coef_: (classes, d) float64, for the prepared rows.
        intercept_: (classes,) float64.
        objective_: Loss of the last epoch.
    """

    def __init__(
        self,
        lr: float = 3.0,
        weight_decay: float = 0.0,
        epochs: int = 100,
        batch_size: int = 256,
        seed: int = 0,
        preprocess: bool = True,
    ) -> None:
        self.lr, self.weight_decay, self.epochs = lr, weight_decay, epochs
        self.batch_size, self.seed, self.preprocess = batch_size, seed, preprocess

    def _fit(self, X: Tensor, labels: Tensor) -> None:
        _check_positive(lr=self.lr, epochs=self.epochs, batch_size=self.batch_size)
        self._check_classes()
        heads = train_heads(
            self._rows(X),
            labels,
            [Recipe(learning_rate=self.lr, weight_decay=self.weight_decay)],
            n_classes=len(self.classes_),
            epochs=self.epochs,
            batch_size=self.batch_size,
            generator=torch.Generator().manual_seed(self.seed),
        )
        self.coef_, self.intercept_ = heads.weights[0].double().numpy(), heads.biases[0].double().numpy()
        self.objective_ = float(heads.losses[0])


def _array(values: Any) -> Any:
    """Return a tensor as a NumPy array, half-precision floats as float32, and anything else as it is."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()


def _tensor(values: NDArray[Any]) -> Tensor:
    """Return a tensor on the same memory, or on a copy of read-only memory, which torch does not support."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}, but must be above 0.")


def _binary_scores(scores: Floats) -> Floats:
    return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores
