// What the tests need inside the page. The application is there since JupyterLab runs with expose_app_in_browser.
() => {
  const lists = (value) =>
    ArrayBuffer.isView(value) ? Array.from(value, lists)
    : Array.isArray(value) ? value.map(lists)
    : typeof value === "number" && !Number.isFinite(value) ? null
    : value;

  window.lab = {
    app: window.jupyterapp,
    kernel: () => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel,
    idle: () => lab.kernel()?.status === "idle",

    // Traces of a figure as plotly.js holds them, typed arrays as lists.
    traces: (figure) =>
      figure.data.map((trace) => {
        const { x, y, z, text, base, width, customdata, name, visible, marker, line } = trace;
        const plain = Object.fromEntries(
          Object.entries({ x, y, z, text, base, width, customdata }).map(([key, value]) => [key, lists(value)]),
        );
        return { ...plain, name, visible, color: lists(marker?.color ?? line?.color) };
      }),

    // From now on: milliseconds from each key that is pressed to the frame that shows the redrawn figure.
    watch: (figure) => {
      lab.times = [];
      let pressed;
      document.addEventListener("keydown", (event) => (pressed = event.timeStamp), { capture: true });
      figure.on("plotly_update", () =>
        requestAnimationFrame(() => {
          if (pressed !== undefined) lab.times.push(performance.now() - pressed);
          pressed = undefined;
        }),
      );
    },

    // Resolves once the kernel is idle and no figure was redrawn for `quiet` milliseconds.
    settled: async (figure, quiet) => {
      let last = performance.now();
      const redrawn = () => (last = performance.now());
      figure.on("plotly_update", redrawn);
      while (!lab.idle() || performance.now() - last < quiet) {
        if (!lab.idle()) redrawn();
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      figure.removeListener("plotly_update", redrawn);
    },
  };
};
