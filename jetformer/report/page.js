const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = figures.map((figure, i) => {
  const plot = document.getElementById(`plot-${i}`);
  Plotly.newPlot(plot, figure.data, figure.layout, {
    responsive: true, displaylogo: false, displayModeBar: "hover", showSendToCloud: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
  });
  return plot;
});
document.getElementById("log").addEventListener("change", event => {
  plots.forEach((plot, i) => {
    if (!figures[i].positive) return;
    if (event.target.checked) Plotly.relayout(plot, {"yaxis.type": "log", "yaxis.autorange": true});
    else if (figures[i].view) Plotly.relayout(plot, {"yaxis.type": "linear", "yaxis.range": figures[i].view.slice()});
    else Plotly.relayout(plot, {"yaxis.type": "linear", "yaxis.autorange": true});
  });
});
