"""What a team switches on: dashboards, alerting rules and examples."""
