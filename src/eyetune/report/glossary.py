"""Every number of a report in one line for a clinician, with where it comes from."""

from __future__ import annotations

from typing import NamedTuple

#: Papers and pages by short name: authors, year, title, address.
SOURCES: dict[str, str] = {
    "brier": "Brier 1950, Verification of forecasts expressed in terms of probability",
    "cohen1960": "Cohen 1960, A coefficient of agreement for nominal scales",
    "cohen1968": "Cohen 1968, Weighted kappa: nominal scale agreement with provision for scaled disagreement",
    "brodersen": "Brodersen et al. 2010, The balanced accuracy and its posterior distribution",
    "good": "Good 1952, Rational decisions",
    "guo": "Guo et al. 2017, On calibration of modern neural networks",
    "nguyen": "Nguyen and O'Connor 2015, Posterior calibration and exploratory analysis for NLP models",
    "hanley": "Hanley and McNeil 1982, The meaning and use of the area under a ROC curve",
    "davis": "Davis and Goadrich 2006, The relationship between precision-recall and ROC curves",
    "wilkinson": "Wilkinson et al. 2003, Proposed international clinical diabetic retinopathy severity scale",
    "altman": "Altman and Bland 1994, Diagnostic tests 1 and 2: sensitivity, specificity, predictive values",
    "lin": "Lin 1989, A concordance correlation coefficient to evaluate reproducibility",
    "bland": "Bland and Altman 1986, Statistical methods for assessing agreement between two methods",
    "efron": "Efron and Tibshirani 1993, An introduction to the bootstrap",
    "geifman": "Geifman and El-Yaniv 2017, Selective classification for deep neural networks",
    "angelopoulos": "Angelopoulos and Bates 2023, Conformal prediction: a gentle introduction",
    "lei": "Lei et al. 2018, Distribution-free predictive inference for regression",
    "lee": "Lee et al. 2018, A simple unified framework for detecting out-of-distribution samples",
    "adebayo": "Adebayo et al. 2018, Sanity checks for saliency maps",
    "mitchell": "Mitchell et al. 2019, Model cards for model reporting",
    "pearson": "Pearson 1895, Note on regression and inheritance in the case of two parents",
    "rijsbergen": "van Rijsbergen 1979, Information retrieval",
    "schapire": "Schapire and Singer 1999, Improved boosting algorithms using confidence-rated predictions",
    "spearman": "Spearman 1904, The proof and measurement of association between two things",
    "sklearn": "as in scikit-learn",
}


class Term(NamedTuple):
    """One number: its name for people, what it means, and where it comes from."""

    label: str
    meaning: str
    source: str = "sklearn"


TERMS: dict[str, Term] = {
    "accuracy": Term("Accuracy", "Of all photographs, the share given exactly the labelled class."),
    "balanced_accuracy": Term(
        "Balanced accuracy",
        "The accuracy within each class, averaged: rare classes count as much as common ones.",
        "brodersen",
    ),
    "kappa": Term(
        "Kappa", "Agreement with the labels beyond what chance would give: 1 perfect, 0 chance.", "cohen1960"
    ),
    "qwk": Term(
        "QWK",
        "Quadratic-weighted kappa: agreement with the grades beyond chance, where a miss by two grades costs four "
        "times a miss by one. 1 is perfect, 0 is chance.",
        "cohen1968",
    ),
    "precision_macro": Term("Precision, mean of classes", "Of those called a class, the share that are, averaged."),
    "recall_macro": Term("Recall, mean of classes", "Of those that are a class, the share called so, averaged."),
    "f1_macro": Term(
        "F1, mean of classes", "The balance of precision and recall of each class, averaged.", "rijsbergen"
    ),
    "precision_weighted": Term("Precision, by class size", "Precision averaged with each class counting by its size."),
    "recall_weighted": Term("Recall, by class size", "Recall averaged by class size: the accuracy again."),
    "f1_weighted": Term("F1, by class size", "F1 averaged with each class counting by its size.", "rijsbergen"),
    "auroc_macro": Term(
        "AUROC",
        "Area under the ROC curve: of two photographs, one with the finding and one without, how often the one with it "
        "gets the higher probability. 1 is perfect, 0.5 is a coin. With several classes: each against the rest, "
        "averaged.",
        "hanley",
    ),
    "auprc_macro": Term(
        "AUPRC",
        "Area under the precision-recall curve. Chance is the share of the class, so it is strict where a class is "
        "rare.",
        "davis",
    ),
    "ece": Term(
        "ECE",
        "Expected calibration error: how far, on average, “80 % sure” is from being right 80 times in 100. 0 is best.",
        "guo",
    ),
    "ece_equal_mass": Term("ECE, equal bins", "The ECE with as many photographs in every bin.", "nguyen"),
    "brier": Term("Brier score", "Mean squared distance of the probabilities from the truth. 0 is best.", "brier"),
    "nll": Term(
        "Log loss", "How surprised the probabilities are by the truth; one sure mistake costs much. 0 is best.", "good"
    ),
    "referable_auroc": Term("Referable DR: AUROC", "AUROC of grade 2 or worse against grade 0 and 1.", "wilkinson"),
    "referable_sensitivity": Term(
        "Referable DR: sensitivity", "Of eyes of grade 2 or worse, the share called so.", "altman"
    ),
    "referable_specificity": Term(
        "Referable DR: specificity", "Of eyes of grade 0 or 1, the share not called referable.", "altman"
    ),
    "referable_sensitivity_at_95_specificity": Term(
        "Referable DR: sensitivity at 95 % specificity",
        "The best sensitivity at a threshold that spares 95 of 100 healthy eyes. That threshold is chosen on the same "
        "photographs, so no threshold fixed beforehand is promised to reach it.",
        "altman",
    ),
    "auroc_micro": Term("AUROC, pooled", "AUROC of all photographs and labels taken together.", "hanley"),
    "auprc_micro": Term("AUPRC, pooled", "AUPRC of all photographs and labels taken together.", "davis"),
    "f1_micro": Term("F1, pooled", "F1 of all photographs and labels taken together.", "rijsbergen"),
    "exact_match": Term("Exact match", "Of all photographs, the share with every label right."),
    "hamming_loss": Term(
        "Wrong labels", "Of all labels of all photographs, the share that is wrong. 0 is best.", "schapire"
    ),
    "mae": Term("Mean absolute error", "How far off the number is on average, in its own units. 0 is best."),
    "rmse": Term("RMSE", "Root of the mean squared error, in the number's units: large misses count more. 0 is best."),
    "r2": Term("R²", "Share of the differences between people that is explained; below 0 is worse than the mean."),
    "pearson": Term(
        "Pearson's r", "Linear correlation: 1 also for a model that is wrong by a constant factor.", "pearson"
    ),
    "spearman": Term("Spearman's rho", "Correlation of the ranks: whether larger is called larger.", "spearman"),
    "ccc": Term("Concordance", "Lin's concordance correlation: how close to saying the very number. 1 is best.", "lin"),
    "bias": Term("Bias", "Mean of predicted less true: how far it is off on the whole.", "bland"),
    "loa_low": Term("Lower limit of agreement", "About 95 % of errors lie between this and the upper one.", "bland"),
    "loa_high": Term("Upper limit of agreement", "About 95 % of errors lie between the lower one and this.", "bland"),
    "sensitivity": Term("Sensitivity", "Of those with the finding, the share called so.", "altman"),
    "specificity": Term("Specificity", "Of those without the finding, the share not called so.", "altman"),
    "ppv": Term(
        "PPV", "Of those called positive, the share that are. It depends on how common the finding is here.", "altman"
    ),
    "npv": Term(
        "NPV", "Of those called negative, the share that are. It depends on how common the finding is here.", "altman"
    ),
    "precision": Term("Precision (PPV)", "Of those called this class, the share that are.", "altman"),
    "recall": Term("Recall (sensitivity)", "Of those of this class, the share called so.", "altman"),
    "f1": Term("F1", "The harmonic mean of precision and recall.", "rijsbergen"),
    "auroc": Term("AUROC", "This class against the rest.", "hanley"),
    "auprc": Term("AUPRC", "This class against the rest; chance is its share.", "davis"),
    "support": Term("Images", "Photographs of this class."),
    "interval": Term(
        "95 % interval",
        "How far chance in who was tested may have moved the score: of 100 such intervals from other patients of the "
        "same kind, about 95 hold the true value. It says nothing of another camera, clinic or grader.",
        "efron",
    ),
    "reliability": Term(
        "Reliability diagram",
        "How often the model is right (upwards) where it is so sure (across). On the diagonal its probabilities can be "
        "taken at their word; below it is too sure.",
        "guo",
    ),
    "selective": Term(
        "Risk and coverage",
        "If only the photographs it is surest of were answered (coverage), how many of those answers would be wrong "
        "(risk). AURC is the area below: smaller is better.",
        "geifman",
    ),
    "conformal": Term(
        "Prediction sets",
        "Instead of one class, a list of classes made to hold the true one with the stated probability, for "
        "photographs like those of the validation split.",
        "angelopoulos",
    ),
    "prediction_interval": Term(
        "Prediction interval",
        "The predicted number, and to either side the error that nine in ten validation patients do not exceed: made "
        "to hold the labelled number with the stated probability, for photographs like those.",
        "lei",
    ),
    "ood": Term(
        "Out of distribution",
        "How unlike the training photographs the features of a photograph are. AUROC 0.5: no telling this dataset from "
        "the validation split; 1: every photograph stands out.",
        "lee",
    ),
    "heat_maps": Term(
        "Heat maps",
        "Where the image drove the answer. A map that looks the same with a network of random weights shows the "
        "image, not what the model learnt: the correlation with that map is given beside it.",
        "adebayo",
    ),
}


def label(name: str) -> str:
    """The name for people of a metric; of one that has no entry (an added one) its own name in words."""
    return TERMS[name].label if name in TERMS else name.replace("_", " ")


def meaning(name: str) -> str:
    """What a number means, in a line; of an added metric what its docstring says first."""
    if name in TERMS:
        return TERMS[name].meaning
    from eyetune.metrics.metric import METRICS

    text = METRICS.get(name).function.__doc__ if name in METRICS else None
    return " ".join((text or "").strip().split("\n\n")[0].split())


def source(name: str) -> str:
    """Where a number comes from."""
    return SOURCES[TERMS[name].source] if name in TERMS else ""
