"""The report: a folder of static pages in which every latent can be looked up, without a server."""

from sae.inspection.report.writer import Grid, ReportFacts, check_report_folder, report_source, write_report

__all__ = ["Grid", "ReportFacts", "check_report_folder", "report_source", "write_report"]
