"""What a person reads after a run: tables, plots, and the worst mistakes on one sheet."""

from lit_transfer.report.diagrams import plot_confusion, plot_predictions, plot_reliability, plot_roc
from lit_transfer.report.plots import contact_sheet, plot_curves, plot_range_test, save_figure
from lit_transfer.report.tables import aligned, summary_table, table

__all__ = [
    "aligned",
    "contact_sheet",
    "plot_confusion",
    "plot_curves",
    "plot_predictions",
    "plot_range_test",
    "plot_reliability",
    "plot_roc",
    "save_figure",
    "summary_table",
    "table",
]
