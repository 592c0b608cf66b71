// What the tests need inside the page. The application is there since JupyterLab runs with expose_app_in_browser.
() => {
  const lists = (value) =>
    ArrayBuffer.isView(value) ? Array.from(value, lists)
    : Array.isArray(value) ? value.map(lists)
    : typeof value === "number" && !Number.isFinite(value) ? null
    : value;

  const pending = new Set(); // messages to the kernel that it has not dealt with

  window.lab = {
    app: window.jupyterapp,
    kernel: () => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel,
    idle: () => lab.kernel()?.status === "idle",

    // Run the cell whose code has this text in it.
    runCell: async (text) => {
      const { content } = lab.app.shell.currentWidget;
      content.activeCellIndex = content.widgets.findIndex(({ model }) => model.sharedModel.source.includes(text));
      await lab.app.commands.execute("notebook:run-cell");
    },

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
      lab.redraws = 0;
      let pressed;
      window.addEventListener("keydown", (event) => (pressed = event.timeStamp), { capture: true });
      figure.on("plotly_afterplot", () => lab.redraws++);
      figure.on("plotly_update", () =>
        requestAnimationFrame(() => {
          if (pressed !== undefined) lab.times.push(performance.now() - pressed);
          pressed = undefined;
        }),
      );
    },

    // An exception in the kernel, an observer's too, becomes an error in the console.
    listen: () =>
      lab.kernel().anyMessage.connect((kernel, { msg, direction }) => {
        if (direction === "send" && msg.channel === "shell") pending.add(msg.header.msg_id);
        if (msg.content.execution_state === "idle") pending.delete(msg.parent_header.msg_id);
        if (msg.header.msg_type === "error") console.error(`kernel: ${msg.content.ename}: ${msg.content.evalue}`);
      }),

    // Resolves once the kernel has dealt with all messages and no figure was redrawn for `quiet` milliseconds.
    settled: async (figure, quiet) => {
      let last = performance.now();
      const redrawn = () => (last = performance.now());
      figure.on("plotly_update", redrawn);
      while (pending.size || performance.now() - last < quiet) {
        if (pending.size) redrawn();
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      figure.removeListener("plotly_update", redrawn);
    },
  };
};
