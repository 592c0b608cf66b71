// What the tests need inside the page. The application is there since JupyterLab runs with expose_app_in_browser.
() => {
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

    // An exception in the kernel, an observer's too, becomes an error in the console.
    listen: () =>
      lab.kernel().anyMessage.connect((kernel, { msg }) => {
        if (msg.header.msg_type === "error") console.error(`kernel: ${msg.content.ename}: ${msg.content.evalue}`);
      }),

  };
};
