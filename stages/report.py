"""Write the page that says what the pruning cost."""

from replaceme.entry import stage
from replaceme.report.page import write_report

if __name__ == "__main__":
    stage(write_report)
